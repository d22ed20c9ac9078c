"""What a preference training is made of, before there is a model: rows, the sequences whose reference log-probs are needed, the objective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dpo_loop.config import KtoLoss, TrainingConfig
from dpo_loop.config.losses import PairLoss
from dpo_loop.errors import InputError
from dpo_loop.training.forward.logprobs import Scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.loop.batches import Spread, cut_for
from dpo_loop.training.objectives.feedback import Feedback, read_feedback, tokenize_feedback
from dpo_loop.training.objectives.kto import Example, KtoObjective, mismatched, split_pairs
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
    estimated: Sequence[Sequence[TokenSequence]] = ()
    """What the estimates of each row put through the model; empty for an objective that has none."""
    tallies: tuple[Tally, ...] = ()

    @property
    def num_tokens(self) -> list[int]:
        """Of each row, through the model."""
        return [sum(sequence.num_forwarded for sequence in row) for row in self.rows]

    @property
    def longest_tokens(self) -> int:
        """Of the longest sequence, through the model."""
        return max(sequence.num_forwarded for row in (*self.rows, *self.estimated) for sequence in row)

    @property
    def widest_tokens(self) -> int:
        """Of the largest row, padded."""
        return max(len(row) * max(sequence.num_forwarded for sequence in row) for row in (*self.rows, *self.estimated))

    def spread_of_estimates(self, scorer: Scorer) -> Spread | None:
        """Mismatched sequences are of other lengths than the rows that they belong to, so they are cut on their own."""
        if not self.estimated:
            return None
        num_tokens = [sum(sequence.num_forwarded for sequence in row) for row in self.estimated]
        return Spread(cut_for(scorer, lambda row: self.estimated[row]), num_tokens)


def examples_of(
    pairs: Sequence[PreferencePair], *, held_out: Sequence[int], feedback: Path | None, base: Path, config: TrainingConfig
) -> Examples:
    """held_out: indices of pairs. feedback: of KTO. Raises InputError for feedback that cannot be trained on."""
    if isinstance(config.loss, KtoLoss):
        return _thumbs(pairs, config.loss, held_out=held_out, feedback=feedback, base=base, config=config)
    chosen, rejected = sequences_of(pairs)
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
    pairs: Sequence[PreferencePair],
    loss: KtoLoss,
    *,
    held_out: Sequence[int],
    feedback: Path | None,
    base: Path,
    config: TrainingConfig,
) -> Examples:
    answers = split_pairs(*sequences_of(pairs))
    given: list[Example | str] = []
    if feedback is not None:
        given = _unseen(read_feedback(feedback), [pairs[pair] for pair in held_out], base=base, path=feedback, config=config)
    contradictory = _contradictory([*answers, *(each for each in given if isinstance(each, Example))])
    given = _new(given, answers, contradictory)
    aside = {2 * pair + half for pair in held_out for half in (0, 1)}
    fates = [
        "contradictory" if answer.sequence in contradictory else "held_out" if row in aside else "trained"
        for row, answer in enumerate(answers)
    ]
    kept = [row for row, fate in enumerate(fates) if fate != "contradictory"]
    held_out_rows = [place for place, row in enumerate(kept) if fates[row] == "held_out"]
    thumbs = sorted((each for each in given if isinstance(each, Example)), key=lambda each: not each.desirable)
    examples = [*(answers[row] for row in kept), *thumbs]
    if len(held_out_rows) == len(examples):
        raise InputError("nothing is left for kto to train on: every answer has a thumb up and a thumb down; mend the feedback")
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

    tallies = [_tally("answers of pairs", fates)] if contradictory.intersection(each.sequence for each in answers) else []
    if given:
        tallies.append(_tally("feedback", [each if isinstance(each, str) else "trained" for each in given]))
    return Examples(
        rows=[[example.sequence] for example in examples],
        held_out=held_out_rows,
        referred=[*(example.sequence for example in examples), *others],
        build=build,
        per_pair=2,
        estimated=[[sequence] for sequence in others],
        tallies=tuple(tallies),
    )


def _tally(of: str, fates: Sequence[str]) -> Tally:
    return Tally(of=of, total=len(fates), parts=dict(Counter(fates)))


def _unseen(
    feedback: Sequence[Feedback], held_out: Sequence[PreferencePair], *, base: Path, path: Path, config: TrainingConfig
) -> list[Example | str]:
    """Feedback as examples, without that for prompts of held-out pairs, known by what they say or by their token ids."""
    found = tokenize_feedback(feedback, str(base), max_length=config.max_length, where=path)
    said, ids = {pair.prompt for pair in held_out}, {pair.prompt_token_ids for pair in held_out}
    return [
        "held_out_prompt" if isinstance(each, Example) and (given.messages[:-1] in said or each.sequence.prompt in ids) else each
        for given, each in zip(feedback, found, strict=True)
    ]


def _contradictory(examples: Sequence[Example]) -> set[TokenSequence]:
    """Answers with a thumb up and a thumb down: nobody knows which is right, so neither is learnt."""
    return {each.sequence for each in examples if each.desirable} & {each.sequence for each in examples if not each.desirable}


def _new(given: Sequence[Example | str], answers: Sequence[Example], contradictory: Set[TokenSequence]) -> list[Example | str]:
    """Feedback that says something new. Answers of pairs are no duplicates of one another: each pair is a judgement of its own."""
    seen, found = {each.sequence for each in answers}, list(given)
    for place, each in enumerate(given):
        if isinstance(each, Example):
            if each.sequence in contradictory:
                found[place] = "contradictory"
            elif each.sequence in seen:
                found[place] = "duplicate"
            seen.add(each.sequence)
    return found
