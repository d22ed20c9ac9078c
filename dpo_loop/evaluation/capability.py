"""Capability of the candidate against a reference, item by item, on rows that the stage `capability` made.

- correct: how much accuracy fell, with Tango's limits and McNemar's exact test. The worst case for the candidate: an item that was not scored is
  wrong for it, and right for the reference.
- nll: by how much perplexity rose, exp((sum nll - sum reference nll) / sum tokens) - 1, with BCa limits over documents.
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
from dpo_loop.types import CapabilityRow


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
        nll, reference, weight = _figure(row), _figure(theirs[id]), row.weight
        if nll is None or reference is None:
            return (
                f"capability task {task}: a document could not be scored for {'the candidate' if nll is None else 'the reference'}"
            )
        if weight != theirs[id].weight or not 0 < weight < math.inf:
            return f"capability task {task}: a document has not the same number of tokens for both policies, or none"
        columns.append((nll, reference, weight))
    samples_CN = np.array(columns).T
    limits = bca_interval(samples_CN.tolist(), perplexity_rise, alpha=alpha, seed=seed)
    with np.errstate(over="ignore"):
        value, other = (float(np.exp(samples_CN[c].sum() / samples_CN[2].sum())) for c in (0, 1))
        harm = float(perplexity_rise(samples_CN[None])[0])
    if limits is None or not all(map(math.isfinite, (value, other, harm))):
        return (
            f"the perplexities of capability task {task} cannot be compared: {len(columns)} documents show no spread between the policies. "
            "It takes several documents, and a candidate that is not the reference itself"
        )
    return CapabilityFigures(
        measure="nll", num_items=len(columns), value=value, reference=other, harm=harm, low=limits[0], high=limits[1]
    )


def perplexity_rise(samples_RCN: Array) -> Array:
    """Relative; columns are nll of the candidate, nll of the reference, tokens."""
    with np.errstate(over="ignore"):
        return np.asarray(np.expm1((samples_RCN[:, 0] - samples_RCN[:, 1]).sum(axis=1) / samples_RCN[:, 2].sum(axis=1)))


def _figure(row: CapabilityRow) -> float | None:
    """What is not a number was not scored."""
    return row.value if row.value is not None and math.isfinite(row.value) else None
