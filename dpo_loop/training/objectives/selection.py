"""Which pairs can be trained on, and a reason for each that cannot: too long pairs are dropped, never cut.

`contradictory`: the same two completions of the same prompt, both ways round; nobody knows which label is right, so none is learnt.
`duplicate`: the same pair again; it would only count twice. Completions and prompts are the same if their token ids are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

from dpo_loop.errors import InputError
from dpo_loop.exchange import PROMPT_TOO_LONG
from dpo_loop.types import PreferencePair, Tally


def select(pairs: Sequence[PreferencePair], *, max_length: int) -> tuple[list[PreferencePair], list[dict[str, Any]]]:
    """(kept, rows of DROPPED). max_length: of the prompt with either completion, tokens."""
    kept, dropped = [], []
    preferences = {_preference(pair) for pair in pairs}
    seen: set[Preference] = set()
    for pair in pairs:
        longest = len(pair.prompt_token_ids) + max(len(pair.chosen_token_ids), len(pair.rejected_token_ids))
        if (reason := _reason(pair, longest, max_length) or _conflict(_preference(pair), preferences, seen)) is None:
            seen.add(_preference(pair))
            kept.append(pair)
            continue
        dropped.append(
            {
                "prompt_id": pair.prompt_id,
                "chosen_id": pair.chosen_id,
                "rejected_id": pair.rejected_id,
                "reason": reason,
                "num_tokens": longest,
            }
        )
    return kept, dropped


Preference = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt, of what is preferred, and to what."""


def _preference(pair: PreferencePair) -> Preference:
    return pair.prompt_token_ids, pair.chosen_token_ids, pair.rejected_token_ids


def _conflict(preference: Preference, preferences: Set[Preference], seen: Set[Preference]) -> str | None:
    prompt, chosen, rejected = preference
    if (prompt, rejected, chosen) in preferences:
        return "contradictory"
    return "duplicate" if preference in seen else None


def _reason(pair: PreferencePair, longest: int, max_length: int) -> str | None:
    if not pair.prompt_token_ids or not (pair.chosen_token_ids or pair.rejected_token_ids):
        return "empty"
    if not (pair.chosen_token_ids and pair.rejected_token_ids):
        return "one_sided"
    if pair.chosen_token_ids == pair.rejected_token_ids:
        return "identical"
    if len(pair.prompt_token_ids) >= max_length:
        return PROMPT_TOO_LONG
    if longest > max_length:
        return "too_long"
    return None


def tally_of(num_held_out: int, num_kept: int, dropped: Sequence[dict[str, Any]]) -> Tally:
    """num_kept: held-out ones included."""
    parts = {"trained": num_kept - num_held_out, "held_out": num_held_out, **Counter(row["reason"] for row in dropped)}
    return Tally(of="pairs", total=num_kept + len(dropped), parts={part: count for part, count in parts.items() if count})


def check_vocabulary(pairs: Sequence[PreferencePair], *, vocab_size: int, where: str) -> None:
    """Raises InputError naming the first pair with a token id that the model does not have, and the id.

    Not a reason to drop a pair: ids of another tokenizer are in all pairs, and those that happen to exist mean something else.
    """
    for number, pair in enumerate(pairs, start=1):
        sides = {"prompt": pair.prompt_token_ids, "chosen": pair.chosen_token_ids, "rejected": pair.rejected_token_ids}
        for side, ids in sides.items():
            if wrong := [token for token in ids if not 0 <= token < vocab_size]:
                raise InputError(
                    f"{where}: pair {number} (prompt {pair.prompt_id}, {pair.chosen_id} over {pair.rejected_id}) has the token id "
                    f"{wrong[0]} in its {side}, but the model knows {vocab_size} tokens. The ids are of another tokenizer, or the file is "
                    "damaged: make the pairs with this run's policy, or start the run from the model that they belong to."
                )
