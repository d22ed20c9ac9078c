"""Capability of the candidate against a reference, item by item, on rows that the stage `capability` made.

- correct: how much accuracy fell, with Tango's limits and McNemar's exact test. The worst case for the candidate: an item that was not scored is
  wrong for it, and right for the reference.
- nll: by how much perplexity rose, exp((sum nll - sum reference nll) / sum tokens) - 1, with BCa limits over documents. A candidate that finds every
  document as likely as the reference does, or less likely by the same share, leaves nothing to chance: its limits are the figure itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpo_loop.evaluation.statistics import mcnemar_p, tango_limit
from dpo_loop.evaluation.statistics.bootstrap import Array, bca_interval
from dpo_loop.evaluation.statistics.power import minimum_detectable_effect
from dpo_loop.exchange import MIN_DOCUMENTS
from dpo_loop.types import CapabilityRow

_SAME_NATS = 1e-9
"""Per token: changes of all documents that lie so near to each other are one change, and so are all weighted means of them."""
_EXPLODED_NATS = 700.0
"""Per token: exp overflows just above. A policy that knows nothing has log(vocabulary), about 12."""


@dataclass(frozen=True, slots=True)
class CapabilityFigures:
    """value, reference: accuracies or perplexities. harm, low, high: how much worse the candidate is, estimate and one-sided limits; of accuracy
    the difference, of perplexity the relative rise."""

    measure: Literal["correct", "nll"]
    num_items: int
    value: float
    reference: float
    harm: float
    low: float
    high: float
    p_value: float | None = None
    mde: float | None = None


def compare(
    task: str, candidate: Iterable[CapabilityRow], reference: Iterable[CapabilityRow], alpha: float, *, seed: int = 0
) -> CapabilityFigures | str:
    """Figures of one task, or the sentence that says why there are none. Rows of other tasks are passed over. seed: of the bootstrap."""
    mine, theirs = _by_item(task, candidate), _by_item(task, reference)
    if mine is None or theirs is None:
        return f"an item of capability task {task} is there twice"
    if not mine or not theirs:
        return f"there is no item of capability task {task} for {'both policies' if not mine and not theirs else 'one of the policies'}"
    if mine.keys() != theirs.keys():
        return (
            f"the policies were not asked the same items of capability task {task}: {len(mine.keys() - theirs.keys())} only the candidate, "
            f"{len(theirs.keys() - mine.keys())} only the reference"
        )
    measures = {row.measure for rows in (mine, theirs) for row in rows.values()}
    if measures == {"correct"}:
        return _accuracy(task, mine, theirs, alpha)
    if measures == {"nll"}:
        return _perplexity(task, mine, theirs, alpha, seed)
    return f"capability task {task} mixes measures"


Rows = Mapping[str, CapabilityRow]


def _by_item(task: str, rows: Iterable[CapabilityRow]) -> Rows | None:
    """None where an item comes twice."""
    of_task = [row for row in rows if row.task == task]
    by_item = {row.item_id: row for row in of_task}
    return by_item if len(by_item) == len(of_task) else None


def _accuracy(task: str, mine: Rows, theirs: Rows, alpha: float) -> CapabilityFigures | str:
    values = [(_figure(mine[id]), _figure(theirs[id])) for id in mine]
    if any(value not in (0.0, 1.0, None) for pair in values for value in pair):
        return f"an item of capability task {task} is neither right (1) nor wrong (0)"
    right = [(value == 1.0, reference != 0.0) for value, reference in values]
    n = len(right)
    worse, better = right.count((False, True)), right.count((True, False))
    return CapabilityFigures(
        measure="correct",
        num_items=n,
        value=sum(ours for ours, _ in right) / n,
        reference=sum(other for _, other in right) / n,
        harm=(worse - better) / n,
        low=tango_limit(worse, better, n, alpha=alpha, side="lower"),
        high=tango_limit(worse, better, n, alpha=alpha, side="upper"),
        p_value=mcnemar_p(worse, better),
        mde=minimum_detectable_effect(n, churn=min(better / n, 0.5), alpha=alpha),
    )


def _perplexity(task: str, mine: Rows, theirs: Rows, alpha: float, seed: int) -> CapabilityFigures | str:
    columns: list[tuple[float, float, float]] = []
    for id, row in mine.items():
        nll, reference, weight = row.value, theirs[id].value, row.weight
        for who, figure in (("candidate", nll), ("reference", reference)):
            if figure is None:
                return f"capability task {task}: a document could not be scored for the {who}"
            if not math.isfinite(figure):
                return f"the perplexity of capability task {task} has exploded: the log-likelihood of a document is {figure:g} for the {who}"
        assert nll is not None
        assert reference is not None
        if weight != theirs[id].weight or not 0 < weight < math.inf:
            return f"capability task {task}: a document has not the same number of tokens for both policies, or none"
        columns.append((nll, reference, weight))
    num = len(columns)
    if num < MIN_DOCUMENTS:
        return f"capability task {task} has {num} documents, and limits over fewer than {MIN_DOCUMENTS} say nothing"
    nll_N, reference_N, tokens_N = np.array(columns).T
    with np.errstate(over="ignore"):
        per_token_2N = np.array([nll_N, reference_N]) / tokens_N
    for who, per_token_N in zip(("candidate", "reference"), per_token_2N, strict=True):
        if (most := float(np.abs(per_token_N).max())) >= _EXPLODED_NATS:
            return (
                f"the perplexity of capability task {task} has exploded: up to {most:.3g} nats per token for the {who}. Either its weights are "
                "broken, or the task counts too few tokens (words, of a script without spaces)"
            )
    value, other = (float(np.exp(of_policy_N.sum() / tokens_N.sum())) for of_policy_N in (nll_N, reference_N))
    change_2N = np.array([nll_N - reference_N, tokens_N])
    harm = float(perplexity_rise(change_2N.mean(axis=1)[None])[0])
    if np.ptp(change_2N[0] / tokens_N) <= _SAME_NATS:
        limits: tuple[float, float] | None = (harm, harm)
    else:
        limits = bca_interval(change_2N, perplexity_rise, alpha=alpha, seed=seed)
    if limits is None:
        return f"the rise of the perplexity of capability task {task} over its {num} documents has no limits: resampling gives none"
    return CapabilityFigures(measure="nll", num_items=num, value=value, reference=other, harm=harm, low=limits[0], high=limits[1])


def perplexity_rise(means_RC: Array) -> Array:
    """Relative; columns are how much larger the candidate's nll is, and tokens."""
    return np.asarray(np.expm1(means_RC[:, 0] / means_RC[:, 1]))


def _figure(row: CapabilityRow) -> float | None:
    """What is not a number was not scored."""
    return row.value if row.value is not None and math.isfinite(row.value) else None
