"""Pairs as an objective, on a real model: the self-check of the first step, figures, and gradients that no cut changes."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import TypeAdapter
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_loop.config import Loss
from dpo_loop.errors import TrainingDivergedError
from dpo_loop.training.forward.logprobs import Scorer
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.objectives.preferences import PairObjective, check_start, sequences_of
from dpo_loop.types import PolicyRef
from tests.training.world import make_pairs

NUM_PAIRS = 9
CHOSEN, REJECTED = sequences_of(make_pairs(NUM_PAIRS, seed=4))
NUM_CHOSEN, NUM_REJECTED = (sum(len(each.completion) for each in side) for side in (CHOSEN, REJECTED))
REFERENCED: list[dict[str, Any]] = [
    {"kind": "sigmoid"},
    {"kind": "sigmoid", "wpo": True},
    {"kind": "sigmoid", "f_divergence": "forward_kl"},
    {"kind": "sigmoid_norm"},
    {"kind": "robust"},
    {"kind": "exo_pair"},
    {"kind": "hinge", "ld_alpha": 0.5},
    {"kind": "ipo"},
    {"kind": "nca_pair"},
    {"kind": "sppo_hard"},
    {"kind": "apo_zero"},
    {"kind": "apo_down"},
]
REFERENCE_FREE: list[dict[str, Any]] = [{"kind": "simpo"}, {"kind": "orpo"}]


@dataclass(frozen=True)
class World:
    """A policy with its own log-probs, and the pairs above."""

    scorer: Scorer
    parameters: list[torch.nn.Parameter]

    def logps(self, sequences: list[TokenSequence]) -> list[Tensor]:
        with torch.no_grad():
            return list(torch.split(self.scorer(sequences).logps_N, [len(each.completion) for each in sequences]))

    def objective(
        self,
        loss: dict[str, Any],
        *,
        chosen_change: float = 0.0,
        rejected_change: float = 0.0,
        nll_weight: float = 0.0,
        start_tolerance: float | None = None,
    ) -> PairObjective:
        """*_change: how much more likely than the reference each token is under the policy, nats."""
        settings = TypeAdapter(Loss).validate_python(loss)
        free = loss in REFERENCE_FREE
        return PairObjective(
            self.scorer,
            CHOSEN,
            REJECTED,
            chosen_reference=None if free else [logps - chosen_change for logps in self.logps(CHOSEN)],
            rejected_reference=None if free else [logps - rejected_change for logps in self.logps(REJECTED)],
            loss=settings,
            nll_weight=nll_weight,
            start_tolerance=start_tolerance,
        )

    def gradient(self, objective: PairObjective, cut: list[list[int]]) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        for rows in cut:
            (objective.sums(rows, estimates={})["loss"] / objective.size(range(NUM_PAIRS))).backward()
        return torch.cat([parameter.grad.flatten() for parameter in self.parameters])


@pytest.fixture(scope="module")
def world(adapted: PolicyRef) -> World:
    bare = AutoModelForCausalLM.from_pretrained(adapted.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(bare, Path(adapted.adapter), is_trainable=True).eval()
    scorer = build_scorer(model, device=torch.device("cpu"), forward="auto")
    return World(scorer, [parameter for parameter in model.parameters() if parameter.requires_grad])


def figures(objective: PairObjective, *, step: int = 0) -> dict[str, float]:
    rows = range(NUM_PAIRS)
    sums = {name: value.item() for name, value in objective.sums(rows, estimates=objective.estimates(rows)).items()}
    return objective.metrics(sums, rows, step=step)


@pytest.mark.parametrize("loss", REFERENCED, ids=str)
def test_a_policy_that_starts_at_its_reference_passes_the_check_of_the_first_step(world: World, loss: dict[str, Any]) -> None:
    row = figures(world.objective(loss, nll_weight=0.2, start_tolerance=1e-3))
    assert row["margin"] == pytest.approx(0, abs=1e-4)
    assert row["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", REFERENCED, ids=str)
def test_a_policy_away_from_its_reference_fails_the_check_of_the_first_step(world: World, loss: dict[str, Any]) -> None:
    objective = world.objective(loss, chosen_change=0.1, rejected_change=-0.1, start_tolerance=1e-3)
    with pytest.raises(TrainingDivergedError, match=r"the loss must be .* differ by 0\.1 nats per token"):
        figures(objective)
    figures(objective, step=1)


def test_the_check_says_that_the_loss_of_dpo_must_be_ln_2(world: World) -> None:
    objective = world.objective({"kind": "sigmoid"}, chosen_change=0.1, start_tolerance=1e-3)
    with pytest.raises(
        TrainingDivergedError, match=r"the loss must be ln 2 = 0\.6931 and no log-prob may differ, but the loss is 0\.6"
    ):
        figures(objective)


def test_equal_shifts_of_both_sides_leave_the_loss_and_are_caught_all_the_same(world: World) -> None:
    """Per token the shift cancels in the loss, so log-probs are compared too."""
    objective = world.objective({"kind": "sigmoid_norm"}, chosen_change=0.1, rejected_change=0.1, start_tolerance=1e-3)
    with pytest.raises(TrainingDivergedError, match=r"the loss is 0\.6931 and log-probs differ by 0\.1 nats"):
        figures(objective)


def test_a_loss_that_is_not_that_of_the_reference_is_caught_although_log_probs_agree() -> None:
    check_start(0.6936, math.log(2), moved=0.0, tolerance=1e-3)
    with pytest.raises(TrainingDivergedError, match=r"ln 2 = 0\.6931 .* the loss is 0\.7500 and log-probs differ by 0 nats"):
        check_start(0.75, math.log(2), moved=0.0, tolerance=1e-3)
    # SPPO with beta 0.001 starts at 2 (1 / 0.002)² = 500,000: its tolerance is relative
    check_start(500_100.0, 500_000.0, moved=0.0, tolerance=1e-3)
    with pytest.raises(TrainingDivergedError, match="the loss must be 500000"):
        check_start(501_000.0, 500_000.0, moved=0.0, tolerance=1e-3)


def test_figures_are_means_over_the_pairs_and_per_token(world: World) -> None:
    row = figures(world.objective({"kind": "sigmoid", "beta": 0.5}, chosen_change=-0.1, rejected_change=-0.3))
    # Rewards are beta times the summed change: 0.5 * -0.1 * tokens / pairs.
    chosen, rejected = -0.05 * NUM_CHOSEN / NUM_PAIRS, -0.15 * NUM_REJECTED / NUM_PAIRS
    right = [len(c.completion) < 3 * len(r.completion) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    # k3 of one token is e^c - 1 - c: 0.004837 of chosen, 0.040818 of rejected tokens
    kl = (0.0048374 * NUM_CHOSEN + 0.0408182 * NUM_REJECTED) / (NUM_CHOSEN + NUM_REJECTED)
    assert 0 < sum(right) < NUM_PAIRS
    assert row == pytest.approx(
        {
            "loss": row["loss"],
            "nll": -sum(float(logps.mean()) for logps in world.logps(CHOSEN)) / NUM_PAIRS,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "accuracy": sum(right) / NUM_PAIRS,
            "margin": chosen - rejected,
            "chosen_logprob_change": -0.1,
            "rejected_logprob_change": -0.3,
            "kl": kl,
            "falling": 1.0,
            "pairs": NUM_PAIRS,
        },
        rel=1e-4,
    )


def test_the_nll_of_chosen_is_added_with_its_weight(world: World) -> None:
    without = figures(world.objective({"kind": "sigmoid"}))
    having = figures(world.objective({"kind": "sigmoid"}, nll_weight=0.25))
    assert having["loss"] == pytest.approx(without["loss"] + 0.25 * without["nll"])


@pytest.mark.parametrize("loss", REFERENCE_FREE, ids=str)
def test_a_reference_free_loss_has_no_figures_of_a_reference(world: World, loss: dict[str, Any]) -> None:
    row = figures(world.objective(loss))
    assert row.keys() == {"loss", "nll", "chosen_reward", "rejected_reward", "accuracy", "margin", "pairs"}
    nll_of = [-float(logps.mean()) for logps in world.logps(CHOSEN)]
    assert row["chosen_reward"] == pytest.approx({"simpo": -2.0, "orpo": -0.1}[loss["kind"]] * sum(nll_of) / NUM_PAIRS)


def test_a_loss_with_a_reference_must_be_given_it(world: World) -> None:
    with pytest.raises(AssertionError, match="ipo needs reference"):
        PairObjective(
            world.scorer,
            CHOSEN,
            REJECTED,
            chosen_reference=None,
            rejected_reference=None,
            loss=TypeAdapter(Loss).validate_python({"kind": "ipo"}),
            nll_weight=0.0,
            start_tolerance=None,
        )


def test_tokens_beyond_the_shorter_completion_count_alpha(world: World) -> None:
    row = figures(world.objective({"kind": "sigmoid", "beta": 1.0, "ld_alpha": 0.25}, chosen_change=-0.1))
    pairs = [(len(c.completion), len(r.completion)) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    counted = sum(min(c, r) + 0.25 * max(0, c - r) for c, r in pairs)
    assert counted < NUM_CHOSEN
    assert row["chosen_reward"] == pytest.approx(-0.1 * counted / NUM_PAIRS, rel=1e-4)
    assert row["chosen_logprob_change"] == pytest.approx(-0.1, rel=1e-4)


def test_wpo_weighs_each_pair_by_the_alignment_of_its_tokens_and_learns_nothing_from_the_weight(world: World) -> None:
    plain = world.objective({"kind": "sigmoid"}, chosen_change=0.1)
    weighted = world.objective({"kind": "sigmoid", "wpo": True}, chosen_change=0.1)
    for row in range(NUM_PAIRS):
        weight = alignment(world, CHOSEN[row]) * alignment(world, REJECTED[row])
        expected = weight * plain.sums([row], estimates={})["loss"].item()
        assert weighted.sums([row], estimates={})["loss"].item() == pytest.approx(expected, rel=1e-4)
        expected_gradient = weight * world.gradient(plain, [[row]])
        assert relative(world.gradient(weighted, [[row]]), expected_gradient) < 1e-4


def alignment(world: World, sequence: TokenSequence) -> float:
    """exp of the mean of log p(token) - log Σ p², from the whole softmax of a forward of its own."""
    ids = torch.tensor([sequence.prompt + sequence.completion])
    with world.scorer.native(), torch.no_grad():
        p_NV = world.scorer.model(input_ids=ids).logits[0, len(sequence.prompt) - 1 : -1].softmax(-1)
    p_N = p_NV.gather(1, torch.tensor(sequence.completion)[:, None]).squeeze(1)
    return float((p_N / p_NV.square().sum(-1)).log().mean().exp())


@pytest.mark.parametrize("loss", [*REFERENCED, *REFERENCE_FREE], ids=str)
def test_the_gradient_does_not_depend_on_the_cut_nor_on_the_order(world: World, loss: dict[str, Any]) -> None:
    objective = world.objective(loss, chosen_change=-0.2, rejected_change=0.1, nll_weight=0.2)
    whole = world.gradient(objective, [list(range(NUM_PAIRS))])
    assert whole.norm() > 1e-3
    for cut in ([[row] for row in range(NUM_PAIRS)], [[8, 1, 5], [0], [7, 2, 6, 4, 3]]):
        assert relative(world.gradient(objective, cut), whole) < 2e-5


def relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()
