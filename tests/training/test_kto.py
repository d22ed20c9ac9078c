"""KTO: pairs split into examples, mismatched completions for its KL estimate, figures."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_loop.config import KtoLoss
from dpo_loop.errors import TrainingDivergedError
from dpo_loop.training.forward.logprobs import Scorer
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.objectives.kto import Example, KtoObjective, mismatched, split_pairs
from dpo_loop.training.objectives.preferences import sequences_of
from dpo_loop.types import PolicyRef
from tests.training.world import make_pairs

UNPAIRED = [
    Example(TokenSequence((5, 6, 7), (8, 9, 0)), desirable=True),
    Example(TokenSequence((5, 6, 9), (12, 0)), desirable=True),
    Example(TokenSequence((6, 6), (11,)), desirable=False),
]
EXAMPLES = [*split_pairs(*sequences_of(make_pairs(5, seed=4))), *UNPAIRED]
MISMATCHED = mismatched(EXAMPLES, max_length=128)
EVERY_ROW = range(len(EXAMPLES))
LOSS = KtoLoss(kind="kto", beta=0.5, desirable_weight=1.5, undesirable_weight=0.5)


def test_a_pair_becomes_a_thumb_up_and_then_a_thumb_down() -> None:
    chosen, rejected = sequences_of(make_pairs(2))
    assert split_pairs(chosen, rejected) == [(chosen[0], True), (rejected[0], False), (chosen[1], True), (rejected[1], False)]


# Prompts by number: few of them, so that one may have most of the examples.
examples_of_few_prompts = st.lists(st.integers(0, 4), min_size=1, max_size=14).map(
    lambda prompts: [Example(TokenSequence((7, prompt), (row, 0)), row % 2 == 0) for row, prompt in enumerate(prompts)]
)


@given(examples=examples_of_few_prompts)
def test_a_mismatched_completion_never_belongs_to_the_prompt(examples: list[Example]) -> None:
    found = mismatched(examples, max_length=128)
    sizes = Counter(each.sequence.prompt for each in examples)
    if len(sizes) == 1:
        assert found == []
        return
    prompts_of = {each.sequence.completion: each.sequence.prompt for each in examples}
    assert [each.prompt for each in found] == [each.sequence.prompt for each in examples]
    assert all(prompts_of[each.completion] != each.prompt for each in found)
    if max(sizes.values()) <= len(examples) / 2:
        assert Counter(each.completion for each in found) == Counter(each.sequence.completion for each in examples)


@given(examples=examples_of_few_prompts, order=st.randoms())
def test_what_is_mismatched_with_an_example_does_not_depend_on_the_order(examples: list[Example], order: object) -> None:
    shuffled = list(examples)
    order.shuffle(shuffled)
    assert Counter(mismatched(shuffled, max_length=128)) == Counter(mismatched(examples, max_length=128))


def test_a_mismatched_completion_is_cut_at_the_longest_sequence() -> None:
    long_prompt, long_completion = TokenSequence((1, 2, 3, 4), (5,)), TokenSequence((1,), (6, 7, 8, 9))
    found = mismatched([Example(long_prompt, True), Example(long_completion, False)], max_length=5)
    assert found == [TokenSequence((1, 2, 3, 4), (6,)), TokenSequence((1,), (5,))]


@dataclass(frozen=True)
class World:
    scorer: Scorer
    parameters: list[torch.nn.Parameter]

    def logps(self, sequences: list[TokenSequence]) -> list[Tensor]:
        with torch.no_grad():
            return list(torch.split(self.scorer(sequences).logps_N, [len(each.completion) for each in sequences]))

    def objective(
        self,
        *,
        change: float = 0.0,
        mismatched_change: float | None = 0.0,
        nll_weight: float = 0.0,
        start_tolerance: float | None = None,
    ) -> KtoObjective:
        """change: how much more likely than the reference each token is under the policy, nats. mismatched_change: None for one prompt."""
        others = [] if mismatched_change is None else MISMATCHED
        return KtoObjective(
            self.scorer,
            EXAMPLES,
            reference=[logps - change for logps in self.logps([each.sequence for each in EXAMPLES])],
            mismatched=others,
            mismatched_reference=[logps - mismatched_change for logps in self.logps(others)] if others else [],
            loss=LOSS,
            nll_weight=nll_weight,
            start_tolerance=start_tolerance,
        )

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, self.parameters)])

    def gradient_of_the_step(self, objective: KtoObjective, cut: list[list[int]]) -> Tensor:
        """As the loop computes it: estimates of all micro-batches first."""
        estimates = estimates_over(objective, cut)
        return sum(self.gradient(objective.sums(rows, estimates=estimates)["loss"]) for rows in cut) / objective.size(EVERY_ROW)


@pytest.fixture(scope="module")
def world(adapted: PolicyRef) -> World:
    bare = AutoModelForCausalLM.from_pretrained(adapted.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(bare, Path(adapted.adapter), is_trainable=True).eval()
    scorer = build_scorer(model, device=torch.device("cpu"), forward="auto")
    return World(scorer, [parameter for parameter in model.parameters() if parameter.requires_grad])


def estimates_over(objective: KtoObjective, cut: list[list[int]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for rows in cut:
        total.update({name: value.item() for name, value in objective.estimates(rows).items()})
    return dict(total)


def figures(objective: KtoObjective, rows: list[int] | range = EVERY_ROW, *, step: int = 0) -> dict[str, float]:
    estimates = estimates_over(objective, [list(rows)])
    sums = {name: value.item() for name, value in objective.sums(rows, estimates=estimates).items()}
    return objective.metrics(sums, rows, step=step)


def test_z0_is_the_mean_log_ratio_of_the_mismatched_sequences(world: World) -> None:
    num_tokens = sum(len(each.completion) for each in MISMATCHED)
    row = figures(world.objective(mismatched_change=0.2))
    assert row["z0"] == pytest.approx(0.2 * num_tokens / len(EXAMPLES), rel=1e-4)
    # Δ = 0 everywhere, so every example is 0.5 z0 below z0 in reward.
    up, down = sum(each.desirable for each in EXAMPLES), sum(not each.desirable for each in EXAMPLES)
    above = 1 / (1 + torch.tensor(0.5 * row["z0"]).exp().item())  # σ(-β z0)
    assert row["loss"] == pytest.approx((1.5 * (1 - above) * up + 0.5 * above * down) / (up + down), rel=1e-4)
    assert row["accuracy"] == pytest.approx(down / (up + down))


def test_an_example_is_on_the_right_side_of_z0_not_of_zero(world: World) -> None:
    row = figures(world.objective(change=0.01, mismatched_change=0.2))
    assert 0 < 0.01 * max(len(each.sequence.completion) for each in EXAMPLES) < row["z0"]  # all rose, none beyond z0
    assert row["accuracy"] == pytest.approx(sum(not each.desirable for each in EXAMPLES) / len(EXAMPLES))


def test_a_negative_estimate_of_the_kl_counts_as_none(world: World) -> None:
    assert figures(world.objective(mismatched_change=-0.2))["z0"] == 0.0


def test_with_one_prompt_there_is_no_estimate(world: World) -> None:
    objective = world.objective(change=0.1, mismatched_change=None)
    assert objective.estimates([0, 1]) == {}
    assert figures(objective)["z0"] == 0.0


def test_the_gradient_does_not_depend_on_the_cut_although_the_estimate_is_of_the_whole_step(world: World) -> None:
    objective = world.objective(change=0.1, mismatched_change=0.2, nll_weight=0.2)
    whole = world.gradient_of_the_step(objective, [list(EVERY_ROW)])
    assert whole.norm() > 1e-3
    for cut in ([[row] for row in EVERY_ROW], [[12, 1, 5, 8], [0], [7, 2, 6, 4, 3, 11, 10, 9]]):
        other = world.gradient_of_the_step(objective, cut)
        assert ((other - whole).norm() / whole.norm()).item() < 2e-5


def test_no_gradient_flows_through_the_estimate(world: World) -> None:
    """λ σ(β(z0 - Δ)) of one desirable example: its gradient is that of -β Δ alone, times λ σ'(β(z0 - Δ))."""
    objective = world.objective(change=0.1, mismatched_change=0.2)
    estimates = estimates_over(objective, [[0]])
    sequence = EXAMPLES[0].sequence
    z0, ratio = 0.2 * len(MISMATCHED[0].completion), 0.1 * len(sequence.completion)
    assert estimates == pytest.approx({"mismatched_ratio": z0, "mismatched": 1}, rel=1e-4)
    share = torch.tensor(0.5 * (z0 - ratio)).sigmoid()
    by_hand = world.gradient(-0.5 * 1.5 * share * (1 - share) * world.scorer([sequence]).logps_N.sum())
    ours = world.gradient(objective.sums([0], estimates=estimates)["loss"])
    assert ((ours - by_hand).norm() / by_hand.norm()).item() < 1e-4


def test_figures_are_means_over_desirable_and_undesirable_examples(world: World) -> None:
    row = figures(world.objective(change=-0.1, mismatched_change=None))
    up = [len(each.sequence.completion) for each in EXAMPLES if each.desirable]
    down = [len(each.sequence.completion) for each in EXAMPLES if not each.desirable]
    nll = [-float(logps.mean()) for logps in world.logps([each.sequence for each in EXAMPLES if each.desirable])]
    expected = {
        "loss": row["loss"],
        "nll": sum(nll) / len(nll),
        "chosen_reward": 0.5 * -0.1 * sum(up) / len(up),
        "rejected_reward": 0.5 * -0.1 * sum(down) / len(down),
        "margin": -0.05 * (sum(up) / len(up) - sum(down) / len(down)),
        "chosen_logprob_change": -0.1,
        "rejected_logprob_change": -0.1,
        "accuracy": len(down) / len(EXAMPLES),  # all fell below z0 = 0
        "falling": 1.0,
        "kl": 0.0048374,  # e^-0.1 - 1 + 0.1
        "z0": 0.0,
        "examples": 13,
    }
    assert row == pytest.approx(expected, rel=1e-4)


def test_a_step_of_one_thumb_has_no_figures_of_the_other(world: World) -> None:
    objective = world.objective(change=0.1)
    assert figures(objective, [0, 2]).keys() == {
        "loss",
        "nll",
        "chosen_reward",
        "chosen_logprob_change",
        "falling",
        "accuracy",
        "kl",
        "z0",
        "examples",
    }
    assert figures(objective, [1]).keys() == {
        "loss",
        "rejected_reward",
        "rejected_logprob_change",
        "accuracy",
        "kl",
        "z0",
        "examples",
    }


def test_the_first_step_is_checked_against_the_loss_at_the_reference(world: World) -> None:
    # λ / 2 each: (7 * 1.5 + 6 * 0.5) / 2 / 13
    assert figures(world.objective(start_tolerance=1e-3))["loss"] == pytest.approx(0.519231, abs=1e-5)
    with pytest.raises(TrainingDivergedError, match=r"the loss must be 0\.5192 and no log-prob may differ"):
        figures(world.objective(change=0.1, start_tolerance=1e-3))
