"""The packed row: what lies where, that nothing lies there twice, and how attention cuts it up."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_loop.training.forward.packing import Span, Tree, num_packed, pack
from dpo_loop.training.forward.sequences import TokenSequence

FIRST = TokenSequence((1, 2, 3), (10, 11, 12))
OTHER = TokenSequence((1, 2, 3), (20, 21))
SHORT = TokenSequence((7,), (30,))


def test_a_prompt_is_laid_out_once_and_its_completions_without_their_last_token() -> None:
    row = pack([FIRST, OTHER, SHORT])
    #                                prompt    first    other  | prompt of short
    assert row.ids_1T.tolist() == [[1, 2, 3, 10, 11, 20, 7]]
    assert row.positions_1T.tolist() == [[0, 1, 2, 3, 4, 3, 0]]
    assert row.layout.trees == (Tree(Span(0, 3), (Span(3, 5), Span(5, 6))), Tree(Span(6, 7), (Span(7, 7),)))
    # The prompt's last token predicts the first one of each completion.
    assert row.scored_S.tolist() == [2, 3, 4, 2, 5, 6]
    assert row.targets_S.tolist() == [10, 11, 12, 20, 21, 30]
    assert row.asked_N is None
    assert row.layout.longest == 5


def test_what_is_asked_twice_lies_in_the_row_once() -> None:
    row = pack([FIRST, SHORT, OTHER, FIRST])
    assert row.ids_1T.shape[1] == num_packed([FIRST, OTHER, SHORT]) == 7
    assert row.targets_S[row.asked_N].tolist() == [10, 11, 12, 30, 20, 21, 10, 11, 12]


ids = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)


@given(st.lists(st.builds(TokenSequence, ids, ids), min_size=1, max_size=8))
@settings(deadline=None)
def test_every_scored_token_follows_its_own_context(sequences: list[TokenSequence]) -> None:
    row = pack(sequences)
    assert row.ids_1T.shape[1] == row.layout.num_tokens == num_packed(sequences)
    asked = torch.arange(len(row.targets_S)) if row.asked_N is None else row.asked_N
    sees = visible(row.layout)
    flat = iter(asked.tolist())
    for prompt, completion in sequences:
        for length, token in enumerate(completion):
            place = next(flat)
            assert row.targets_S[place] == token
            context = sees[row.scored_S[place]].nonzero().flatten()
            assert row.ids_1T[0, context].tolist() == list(prompt + completion[:length])
            assert row.positions_1T[0, context].tolist() == list(range(len(context)))


def visible(layout) -> torch.Tensor:
    """[T, T], true where a token of the row attends to another, by the tables that variable-length kernels get."""
    tables = layout.tables(torch.device("cpu"))
    keys, starts_q, starts_k = tables.keys, tables.starts_q.tolist(), tables.starts_k.tolist()
    sees = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
    for index in range(len(starts_q) - 1):
        queries = range(starts_q[index], starts_q[index + 1])
        own = keys[starts_k[index] : starts_k[index + 1]]
        assert len(queries) <= tables.longest_q
        assert len(own) <= tables.longest_k
        for offset, query in enumerate(queries):  # causal, the last query sees the last key
            sees[query, own[: len(own) - len(queries) + offset + 1]] = True
    return sees
