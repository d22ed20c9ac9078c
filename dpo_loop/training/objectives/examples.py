"""What a preference training is made of, before there is a model: rows, the sequences whose reference log-probs are needed, the objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dpo_loop.config import KtoLoss, TrainingConfig
from dpo_loop.config.losses import PairLoss
from dpo_loop.training.forward.logprobs import Scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.objectives.kto import KtoObjective, mismatched, read_feedback, split_pairs, tokenize_feedback
from dpo_loop.training.objectives.preferences import PairObjective, sequences_of
from dpo_loop.types import PreferencePair, Tally

PreferenceObjective = PairObjective | KtoObjective


@dataclass(frozen=True, slots=True)
class Examples:
    """rows: what each row of the objective puts through the model. held_out: rows that are not trained on.

    referred: the sequences whose reference log-probs `build` takes, per token, in this order; empty for a loss without a reference.
    """

    rows: Sequence[Sequence[TokenSequence]]
    held_out: Sequence[int]
    referred: Sequence[TokenSequence]
    build: Callable[[Scorer, Sequence[Tensor], float | None], PreferenceObjective]
    """(scorer, reference log-probs of `referred`, start tolerance)."""
    per_pair: int = 1
    """Rows that a pair makes."""
    tallies: tuple[Tally, ...] = ()

    @property
    def num_tokens(self) -> list[int]:
        """Of each row, through the model."""
        return [sum(sequence.num_forwarded for sequence in row) for row in self.rows]


def examples_of(
    pairs: Sequence[PreferencePair], *, held_out: Sequence[int], feedback: Path | None, base: Path, config: TrainingConfig
) -> Examples:
    """held_out: indices of pairs. feedback: of KTO. Raises InputError for feedback that cannot be trained on."""
    chosen, rejected = sequences_of(pairs)
    if isinstance(config.loss, KtoLoss):
        return _thumbs(chosen, rejected, config.loss, held_out=held_out, feedback=feedback, base=base, config=config)
    needs_reference = isinstance(config.loss, PairLoss)

    def build(scorer: Scorer, reference: Sequence[Tensor], start_tolerance: float | None) -> PairObjective:
        return PairObjective(
            scorer,
            chosen,
            rejected,
            chosen_reference=reference[: len(chosen)] if needs_reference else None,
            rejected_reference=reference[len(chosen) :] if needs_reference else None,
            loss=config.loss,
            nll_weight=config.nll_weight,
            start_tolerance=start_tolerance,
        )

    return Examples(
        rows=list(zip(chosen, rejected, strict=True)),
        held_out=held_out,
        referred=[*chosen, *rejected] if needs_reference else [],
        build=build,
    )


def _thumbs(
    chosen: Sequence[TokenSequence],
    rejected: Sequence[TokenSequence],
    loss: KtoLoss,
    *,
    held_out: Sequence[int],
    feedback: Path | None,
    base: Path,
    config: TrainingConfig,
) -> Examples:
    examples = split_pairs(chosen, rejected)
    tallies: tuple[Tally, ...] = ()
    if feedback is not None:
        more, tally = tokenize_feedback(read_feedback(feedback), str(base), max_length=config.max_length)
        examples, tallies = [*examples, *more], (tally,)
    others = mismatched(examples, max_length=config.max_length)

    def build(scorer: Scorer, reference: Sequence[Tensor], start_tolerance: float | None) -> KtoObjective:
        return KtoObjective(
            scorer,
            examples,
            reference=reference[: len(examples)],
            mismatched=others,
            mismatched_reference=reference[len(examples) :],
            loss=loss,
            nll_weight=config.nll_weight,
            start_tolerance=start_tolerance,
        )

    return Examples(
        rows=[[example.sequence] for example in examples],
        held_out=[row for pair in held_out for row in (2 * pair, 2 * pair + 1)],
        referred=[*(example.sequence for example in examples), *others],
        build=build,
        per_pair=2,
        tallies=tallies,
    )
