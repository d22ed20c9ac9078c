"""What a KTO training is made of: pairs and feedback without what is held out, said twice, or said both ways."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from dpo_loop.errors import InputError
from dpo_loop.training.forward.logprobs import Scorer
from dpo_loop.training.forward.packing import num_packed
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.loop.accumulation import Accumulator
from dpo_loop.training.loop.batches import Spread, cut_for
from dpo_loop.training.models import build_accelerator, load_policy
from dpo_loop.training.objectives.examples import Examples, examples_of
from dpo_loop.training.processes import Processes
from dpo_loop.types import Message, PolicyRef, PreferencePair
from tests.builders import build_model
from tests.training.world import END, make_pair, make_pairs, training_config

CONFIG = training_config(loss={"kind": "kto"})
ACCELERATOR = build_accelerator("float32")


def thumb(question: str, answer: str, up: bool) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "thumbs_up": up,
    }


def tokens(base: str, question: str, answer: str) -> TokenSequence:
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer.apply_chat_template(thumb(question, "", True)["messages"][:1], add_generation_prompt=True, return_dict=False)
    return TokenSequence(tuple(prompt), (*tokenizer.encode(answer, add_special_tokens=False), END))


def pair_of(base: str, question: str, chosen: str, rejected: str) -> PreferencePair:
    good, bad = tokens(base, question, chosen), tokens(base, question, rejected)
    return make_pair(question, prompt=good.prompt, chosen=good.completion, rejected=bad.completion)


def made(
    tmp_path: Path, base: str, *rows: dict[str, Any], pairs: Sequence[PreferencePair], held_out: Sequence[int] = ()
) -> tuple[Examples, list[dict[str, int]]]:
    path = tmp_path / "feedback.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = examples_of(pairs, held_out=held_out, feedback=path if rows else None, base=Path(base), config=CONFIG)
    return examples, [tally.parts for tally in examples.tallies]


def test_feedback_for_a_held_out_prompt_is_not_trained_on(tmp_path: Path, base: PolicyRef) -> None:
    pairs = [pair_of(base.base, "count", "five", "upper"), pair_of(base.base, "say", "case", "words")]
    rows = [thumb("count", "the five", True), thumb("say", "the words", False), thumb("upper", "case", True)]
    examples, tallies = made(tmp_path, base.base, *rows, pairs=pairs, held_out=[0])
    assert tallies == [{"held_out_prompt": 1, "trained": 2}]
    held_out = {examples.rows[row][0].prompt for row in examples.held_out}
    trained = [examples.rows[row][0].prompt for row in range(len(examples.rows)) if row not in set(examples.held_out)]
    assert held_out == {tokens(base.base, "count", "").prompt}
    assert len(trained) == 4
    assert not held_out.intersection(trained)


def test_a_held_out_prompt_is_also_known_by_what_it_says(tmp_path: Path, base: PolicyRef) -> None:
    """An engine may have rendered it to other tokens, with a date or a system turn in between."""
    rendered_otherwise = make_pair("count", prompt=(9, 9, 9), chosen=(6, END), rejected=(7, END))
    assert rendered_otherwise.prompt == (Message(role="user", content="count"),)
    _, tallies = made(tmp_path, base.base, thumb("count", "five", True), pairs=[rendered_otherwise, *make_pairs(2)], held_out=[0])
    assert tallies == [{"held_out_prompt": 1}]


def test_feedback_that_says_both_is_left_out_and_what_is_said_again_is_kept_once(tmp_path: Path, base: PolicyRef) -> None:
    rows = [
        thumb("count", "five", True),
        thumb("count", "five", False),
        thumb("count", "upper", True),
        thumb("count", "upper", True),
        thumb("say", "five", False),
    ]
    examples, tallies = made(tmp_path, base.base, *rows, pairs=make_pairs(2))
    assert tallies == [{"contradictory": 2, "trained": 2, "duplicate": 1}]
    assert [row[0] for row in examples.rows[4:]] == [tokens(base.base, "count", "upper"), tokens(base.base, "say", "five")]


def test_an_answer_that_a_pair_chose_and_feedback_refused_is_learnt_neither_way(tmp_path: Path, base: PolicyRef) -> None:
    pairs = [*make_pairs(1), pair_of(base.base, "count", "five", "upper"), *make_pairs(2, seed=3)[1:]]
    rows = [thumb("count", "five", False), thumb("count", "upper", False)]
    examples, tallies = made(tmp_path, base.base, *rows, pairs=pairs, held_out=[2])
    assert tallies == [{"trained": 3, "held_out": 2, "contradictory": 1}, {"contradictory": 1, "duplicate": 1}]
    sequences = [row[0] for row in examples.rows]
    assert tokens(base.base, "count", "five") not in sequences
    assert sequences.count(tokens(base.base, "count", "upper")) == 1
    assert [sequences[row].completion for row in examples.held_out] == [pairs[2].chosen_token_ids, pairs[2].rejected_token_ids]


def test_the_worst_of_one_pair_that_is_the_best_of_another_is_learnt_neither_way(tmp_path: Path, base: PolicyRef) -> None:
    pairs = [pair_of(base.base, "count", "five", "upper"), pair_of(base.base, "count", "upper", "case")]
    examples, tallies = made(tmp_path, base.base, pairs=pairs)
    assert tallies == [{"trained": 2, "contradictory": 2}]
    assert [row[0] for row in examples.rows] == [tokens(base.base, "count", "five"), tokens(base.base, "count", "case")]


def test_the_best_of_one_pair_may_be_the_best_of_another(tmp_path: Path, base: PolicyRef) -> None:
    pairs = [pair_of(base.base, "count", "five", "upper"), pair_of(base.base, "count", "five", "case"), *make_pairs(1)]
    examples, tallies = made(tmp_path, base.base, pairs=pairs)
    assert (len(examples.rows), tallies) == (6, [])


def test_where_all_is_said_both_ways_nothing_is_left(tmp_path: Path, base: PolicyRef) -> None:
    rows = [thumb("count", "five", False), thumb("count", "upper", True)]
    with pytest.raises(InputError, match="nothing is left for kto to train on"):
        made(tmp_path, base.base, *rows, pairs=[pair_of(base.base, "count", "five", "upper")])


def test_feedback_with_tokens_that_the_model_does_not_know_is_named_with_its_line(tmp_path: Path) -> None:
    """It went on to the embedding, and to an IndexError."""
    model = build_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<|new{number}|>" for number in range(60)])
    tokenizer.save_pretrained(model)
    rows = [thumb("count", "five", True), thumb("count", "<|new59|>", False)]
    with pytest.raises(
        InputError, match=r"feedback\.jsonl:2: token id \d+ in its completion is not in the model's vocabulary of 320"
    ):
        made(tmp_path, str(model), *rows, pairs=make_pairs(2))


class Watched(Scorer):
    """A scorer that keeps what it was called with."""

    def __call__(self, sequences: Sequence[TokenSequence], **options: Any) -> Any:
        CALLS.append(list(sequences))
        return super().__call__(sequences, **options)


CALLS: list[list[TokenSequence]] = []


def num_tokens(scorer: Scorer, sequences: Sequence[TokenSequence]) -> int:
    """That one forward takes, padding included."""
    if scorer.packed:
        return num_packed(sequences)
    return len(sequences) * max(each.num_forwarded for each in sequences)


@pytest.mark.parametrize("forward", ["auto", "padded"])
def test_mismatched_sequences_are_cut_by_their_own_length(forward: str, tmp_path: Path, base: PolicyRef) -> None:
    """Long prompts have short answers and short prompts long ones: what is mismatched is longer than any row."""
    long = [make_pair(f"l{i}", prompt=(5, i) * 25, chosen=(6, END), rejected=(7, i)) for i in range(8, 12)]
    short = [make_pair(f"s{i}", prompt=(9, i), chosen=(*(6, i) * 25, END), rejected=(7, i) * 25) for i in range(8, 12)]
    examples, _ = made(tmp_path, base.base, pairs=[*long, *short])
    rows = range(len(examples.rows))
    assert max(examples.num_tokens) < examples.longest_tokens == examples.widest_tokens == 100

    built = build_scorer(load_policy(base, accelerator=ACCELERATOR), device=torch.device("cpu"), forward=forward)
    scorer = Watched(built.model, built.device, built.packed, built.head, built.native_attention, built.reason)
    assert scorer.packed == (forward == "auto")
    reference = [torch.full((len(each.completion),), -6.0) for each in examples.referred]
    objective = examples.build(scorer, reference, None)

    def sums(max_tokens: int, estimates: Spread | None) -> dict[str, float]:
        CALLS.clear()
        accumulator = Accumulator(
            objective,
            cut=cut_for(scorer, lambda row: examples.rows[row]),
            num_tokens=examples.num_tokens,
            estimates=estimates,
            accelerator=ACCELERATOR,
            processes=Processes(ACCELERATOR),
            model=scorer.model,
        )
        return accumulator.look(rows, max_tokens=max_tokens)

    own = examples.spread_of_estimates(scorer)
    whole = sums(10_000, own)
    assert whole["z0"] > 0
    cut = sums(110, own)
    assert len(CALLS) > 10
    assert max(num_tokens(scorer, call) for call in CALLS) <= 110
    assert cut == pytest.approx(whole, rel=1e-6)
    assert sums(110, None) == pytest.approx(whole, rel=1e-6)
    assert max(num_tokens(scorer, call) for call in CALLS) > 110
