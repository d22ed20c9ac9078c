"""The order and the cut: every example once an epoch, budgets kept, gradients the same for any cut."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_loop.config import SigmoidLoss
from dpo_loop.training.forward.packing import num_packed
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.loop.batches import (
    cut_for,
    epoch_order,
    micro_batches,
    optimizer_steps,
    packed_micro_batches,
    padded_micro_batches,
)
from dpo_loop.training.models import build_accelerator, continue_adapter, load_base, set_training_mode, trainable_parameters
from dpo_loop.training.objectives.preferences import PairObjective, sequences_of
from dpo_loop.training.reference import reference_logprobs
from dpo_loop.types import PolicyRef
from tests.training.world import make_pairs


@given(num=st.integers(1, 200), epochs=st.integers(1, 3), per_step=st.integers(1, 70), seed=st.integers(0, 5))
def test_every_example_is_seen_once_an_epoch(num: int, epochs: int, per_step: int, seed: int) -> None:
    steps = optimizer_steps(num, epochs=epochs, per_step=per_step, seed=seed)
    assert Counter(row for step in steps for row in step) == dict.fromkeys(range(num), epochs)
    assert max(map(len, steps)) <= per_step
    assert steps == optimizer_steps(num, epochs=epochs, per_step=per_step, seed=seed)


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = {tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), budget=st.integers(1, 300))
@settings(deadline=None)
def test_micro_batches_hold_each_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    cut = micro_batches(range(len(lengths)), lengths, max_tokens=budget)
    assert sorted(row for batch in cut for row in batch) == list(range(len(lengths)))
    for batch in cut:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget


def test_a_cut_is_made_where_it_saves_more_padding_than_it_costs() -> None:
    #            two short, two long: padding them together would waste 2 * 990 tokens
    assert micro_batches(range(4), [10, 1000, 10, 1000], max_tokens=8192) == [[1, 3], [0, 2]]
    assert micro_batches(range(4), [10, 20, 10, 20], max_tokens=8192) == [[0, 2, 1, 3]]


pair_ids = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)


@given(
    pairs=st.lists(st.tuples(pair_ids, pair_ids, pair_ids), min_size=1, max_size=12),
    budget=st.integers(1, 40),
    packed=st.booleans(),
)
@settings(deadline=None)
def test_micro_batches_of_pairs_hold_each_pair_once_within_the_budget(
    pairs: list[tuple[tuple[int, ...], ...]], budget: int, packed: bool
) -> None:
    def sequences(row: int) -> list[TokenSequence]:
        prompt, chosen, rejected = pairs[row]
        return [TokenSequence(prompt, chosen), TokenSequence(prompt, rejected)]

    rows = range(len(pairs))
    if packed:
        cut = packed_micro_batches(rows, budget, sequences_of=sequences)
        sizes = [num_packed([each for row in batch for each in sequences(row)]) for batch in cut]
    else:
        cut = padded_micro_batches(rows, budget, sequences_of=sequences, device="cpu")
        sizes = [2 * len(batch) * max(each.num_forwarded for row in batch for each in sequences(row)) for batch in cut]
    assert sorted(row for batch in cut for row in batch) == list(rows)
    assert all(len(batch) == 1 or size <= budget for batch, size in zip(cut, sizes, strict=True))


def test_pairs_of_one_prompt_share_a_row() -> None:
    prompts = {0: 1, 1: 2, 2: 1, 3: 2}

    def sequences(row: int) -> list[TokenSequence]:
        return [TokenSequence((prompts[row],) * 50, (9, row)), TokenSequence((prompts[row],) * 50, (8, row))]

    assert sorted(map(sorted, packed_micro_batches(range(4), 60, sequences_of=sequences))) == [[0, 2], [1, 3]]


@dataclass(frozen=True)
class Problem:
    """Thirteen ragged pairs whose policy is away from their reference."""

    objective: PairObjective

    def sequences(self, row: int) -> list[TokenSequence]:
        return [self.objective.chosen[row], self.objective.rejected[row]]

    def gradient(self, cut: list[list[int]]) -> torch.Tensor:
        """Of the mean loss, from micro-batches."""
        parameters = trainable_parameters(self.objective.scorer.model, adapter_only=True).values()
        for parameter in parameters:
            parameter.grad = None
        for rows in cut:
            (self.objective.sums(rows, estimates={})["loss"] / self.objective.size(range(13))).backward()
        return torch.cat([parameter.grad.flatten() for parameter in parameters])


@pytest.fixture(params=["auto", "padded"])
def problem(request: pytest.FixtureRequest, base: PolicyRef, adapted: PolicyRef, tmp_path: Path) -> Problem:
    accelerator = build_accelerator("float32")
    chosen, rejected = sequences_of(make_pairs(13, seed=4))
    values = reference_logprobs(base, [*chosen, *rejected], accelerator=accelerator, keep=tmp_path, max_tokens=400)
    bare = load_base(base.base, accelerator=accelerator, frozen=True)
    model = continue_adapter(bare, Path(adapted.adapter), dropout=0.0)
    return Problem(
        PairObjective(
            build_scorer(model, device=torch.device("cpu"), forward=request.param),
            chosen,
            rejected,
            chosen_reference=values[:13],
            rejected_reference=values[13:],
            loss=SigmoidLoss(kind="sigmoid"),
            nll_weight=0.2,
            start_tolerance=None,
        )
    )


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def test_the_gradient_does_not_depend_on_the_micro_batches(problem: Problem) -> None:
    whole = problem.gradient([list(range(13))])
    assert whole.norm() > 0.01
    ragged = cut_for(problem.objective.scorer, problem.sequences)(range(13), 60)
    assert len(ragged) > 4
    for cut in ([[row] for row in range(13)], ragged, [list(range(12)), [12]]):
        assert relative(problem.gradient(cut), whole) < 2e-5


def test_gradient_checkpointing_computes_layers_twice_and_leaves_the_gradient(problem: Problem) -> None:
    model, cut = problem.objective.scorer.model, [list(range(13))]
    set_training_mode(model, gradient_checkpointing=False)
    plain = problem.gradient(cut)
    num_calls = Counter[str]()
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: num_calls.update(["forward"]))
    set_training_mode(model, gradient_checkpointing=True)
    assert relative(problem.gradient(cut), plain) < 1e-6
    assert num_calls["forward"] == 2
    assert not any(module.training for module in model.modules() if isinstance(module, torch.nn.Dropout))
