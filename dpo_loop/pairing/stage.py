"""Stage `pair`: judgements → preference pairs that TRL reads, and a reason for every prompt that gave none.

Only a verdict with the same winner in both orders makes a pair. Everything else is dropped with its reason and figures; pairs are never
truncated or mended. The files are a function of the inputs alone: same inputs, same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from dpo_loop.artifacts import Stage
from dpo_loop.config import PairingConfig
from dpo_loop.errors import CorruptArtifactError, NoPairsError
from dpo_loop.exchange import DROPPED, PAIRS, read_completions, read_judgements, read_prompts
from dpo_loop.files import write_jsonl
from dpo_loop.progress import say
from dpo_loop.types import (
    Completion,
    FinishReason,
    Message,
    PreferencePair,
    Prompt,
    PromptJudgement,
    StageOutcome,
    Tally,
    VerdictKind,
)

VERSION = 1


class Drop(StrEnum):
    """Why a prompt gave no pair; the first that applies, in this order."""

    NOTHING_TO_COMPARE = "nothing_to_compare"
    UNDECIDED = "undecided"
    INCONSISTENT = "inconsistent"
    TIE = "tie"
    WEAK = "weak"
    LOW_MARGIN = "low_margin"
    EMPTY = "empty"
    IDENTICAL = "identical"
    TRUNCATED = "truncated"
    LENGTH_RATIO = "length_ratio"


_DROP_OF_KIND = {
    VerdictKind.UNDECIDED: Drop.UNDECIDED,
    VerdictKind.INCONSISTENT: Drop.INCONSISTENT,
    VerdictKind.TIE: Drop.TIE,
    VerdictKind.WEAK: Drop.WEAK,
}


@dataclass(frozen=True, slots=True)
class Dropped:
    prompt_id: str
    reason: Drop
    figures: dict[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        return {"prompt_id": self.prompt_id, "reason": self.reason.value, **self.figures}


def _run(out: Path, *, prompts: Path, completions: Path, judgements: Path, config: PairingConfig) -> StageOutcome:
    asked = list(read_prompts(prompts))
    judged = list(read_judgements(judgements))
    named = {completion_id for judgement in judged for completion_id in (judgement.best_id, judgement.worst_id)}
    answers = {completion.id: completion for completion in read_completions(completions) if completion.id in named}
    made = list(pair_all(asked, judged, answers, config))
    pairs = [item for item in made if isinstance(item, PreferencePair)]
    dropped = [item for item in made if isinstance(item, Dropped)]
    counts = Counter(item.reason for item in dropped)
    tally = Tally(of="prompts", total=len(asked), parts={"pairs": len(pairs)} | {drop.value: counts[drop] for drop in Drop})
    say(f"pair: {len(pairs)} pairs from {len(asked)} prompts; {_listed(counts) or 'none dropped'}")
    if len(pairs) < config.min_pairs:
        raise NoPairsError(_too_few(len(pairs), len(asked), counts, config))
    write_jsonl(out / PAIRS, pairs)
    write_jsonl(out / DROPPED, (item.row for item in dropped))
    return StageOutcome(tallies=(tally,), metrics=figures(pairs, len(asked)))


PAIR = Stage(name="pair", version=VERSION, run=_run)


def pair_all(
    prompts: Sequence[Prompt], judgements: Iterable[PromptJudgement], answers: dict[str, Completion], config: PairingConfig
) -> Iterator[PreferencePair | Dropped]:
    """One item per prompt, in the order of `prompts`. Raises CorruptArtifactError if the files do not belong together."""
    by_prompt: dict[str, PromptJudgement] = {}
    for judgement in judgements:
        if judgement.prompt_id in by_prompt:
            raise CorruptArtifactError(
                f"prompt {judgement.prompt_id} is judged twice; remove the judge stage and run the same command again"
            )
        by_prompt[judgement.prompt_id] = judgement
    if by_prompt.keys() != {prompt.id for prompt in prompts}:
        odd = sorted(by_prompt.keys() ^ {prompt.id for prompt in prompts})
        raise CorruptArtifactError(
            f"judgements and prompts are of different rounds: {len(odd)} prompts differ, the first is {odd[0]}"
        )
    for prompt in prompts:
        yield pair_of(prompt, by_prompt[prompt.id], answers, config)


def pair_of(
    prompt: Prompt, judgement: PromptJudgement, answers: dict[str, Completion], config: PairingConfig
) -> PreferencePair | Dropped:
    verdict = judgement.verdict
    if verdict is None:
        return Dropped(prompt.id, Drop.NOTHING_TO_COMPARE, {"why": judgement.why})
    if verdict.kind is not VerdictKind.WINNER:
        return Dropped(prompt.id, _DROP_OF_KIND[verdict.kind], {"p_a": verdict.p_a, "margin": verdict.margin})
    assert verdict.winner_id is not None
    assert verdict.loser_id is not None
    if missing := [name for name in (verdict.winner_id, verdict.loser_id) if name not in answers]:
        raise CorruptArtifactError(f"prompt {prompt.id} is judged on completion {missing[0]}, which the completions do not hold")
    chosen, rejected = answers[verdict.winner_id], answers[verdict.loser_id]
    if not prompt.id == chosen.prompt_id == rejected.prompt_id or chosen.prompt_token_ids != rejected.prompt_token_ids:
        raise CorruptArtifactError(f"completions {chosen.id} and {rejected.id} do not answer the same prompt {prompt.id}")
    if reason := why_not(chosen, rejected, verdict.margin, config):
        return Dropped(prompt.id, reason, _figures_of(chosen, rejected, verdict.margin))
    return PreferencePair(
        prompt=prompt.messages,
        chosen=(Message(role="assistant", content=chosen.text),),
        rejected=(Message(role="assistant", content=rejected.text),),
        prompt_id=prompt.id,
        chosen_id=chosen.id,
        rejected_id=rejected.id,
        prompt_token_ids=chosen.prompt_token_ids,
        chosen_token_ids=chosen.token_ids,
        rejected_token_ids=rejected.token_ids,
        margin=verdict.margin,
        ballot_keys=verdict.ballot_keys,
    )


def why_not(chosen: Completion, rejected: Completion, margin: float, config: PairingConfig) -> Drop | None:
    """Why a clear winner still makes no pair; None if it makes one."""
    lengths = sorted((len(chosen.token_ids), len(rejected.token_ids)))
    if margin < config.min_margin:
        return Drop.LOW_MARGIN
    if lengths[0] == 0 or not chosen.text.strip() or not rejected.text.strip():
        return Drop.EMPTY
    if chosen.text.strip() == rejected.text.strip() or chosen.token_ids == rejected.token_ids:
        return Drop.IDENTICAL
    if config.drop_truncated and FinishReason.LENGTH in (chosen.finish_reason, rejected.finish_reason):
        return Drop.TRUNCATED
    if lengths[1] > config.max_length_ratio * lengths[0]:
        return Drop.LENGTH_RATIO
    return None


def _figures_of(chosen: Completion, rejected: Completion, margin: float) -> dict[str, Any]:
    return {
        "margin": margin,
        "chosen_id": chosen.id,
        "rejected_id": rejected.id,
        "chosen_tokens": len(chosen.token_ids),
        "rejected_tokens": len(rejected.token_ids),
        "chosen_finish": chosen.finish_reason.value,
        "rejected_finish": rejected.finish_reason.value,
    }


def figures(pairs: Sequence[PreferencePair], num_prompts: int) -> dict[str, Any]:
    """Lengths are watched because a judge that likes length makes every round longer: chosen_longer_rate far above 0.5 is a warning."""
    chosen = [len(pair.chosen_token_ids) for pair in pairs]
    rejected = [len(pair.rejected_token_ids) for pair in pairs]
    return {
        "num_pairs": len(pairs),
        "yield": None if num_prompts == 0 else len(pairs) / num_prompts,
        "mean_margin": sum(pair.margin for pair in pairs) / len(pairs),
        "mean_chosen_tokens": sum(chosen) / len(pairs),
        "mean_rejected_tokens": sum(rejected) / len(pairs),
        "chosen_longer_rate": sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(pairs),
    }


def _listed(counts: Counter[Drop]) -> str:
    return ", ".join(f"{drop.value} {counts[drop]}" for drop in Drop if counts[drop])


def _too_few(num_pairs: int, num_prompts: int, counts: Counter[Drop], config: PairingConfig) -> str:
    ways_out = {
        Drop.NOTHING_TO_COMPARE: "sample more or more varied answers (generation.k, generation.temperature)",
        Drop.IDENTICAL: "sample more varied answers (generation.k, generation.temperature)",
        Drop.TRUNCATED: "raise generation.max_new_tokens",
        Drop.LENGTH_RATIO: "raise pairing.max_length_ratio",
        Drop.LOW_MARGIN: "lower pairing.min_margin",
        Drop.UNDECIDED: "see ballots.jsonl of the judge stage for what the judge replied",
        Drop.INCONSISTENT: "use a judge with less position bias",
        Drop.TIE: "use prompts or a judge that tell the answers apart, or a larger generation.k",
        Drop.WEAK: "use a judge that tells the answers apart",
        Drop.EMPTY: "look at the completions: the policy answers with nothing",
    }
    most = max(Drop, key=lambda drop: counts[drop])
    hint = f" Way out for the most frequent reason ({most.value}): {ways_out[most]}." if counts[most] else ""
    return (
        f"{num_pairs} of {num_prompts} prompts gave a preference pair; pairing.min_pairs is {config.min_pairs}. "
        f"Dropped: {_listed(counts) or 'none'}. The policy stays as it is.{hint}"
    )
