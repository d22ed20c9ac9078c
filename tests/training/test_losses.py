"""Losses against values worked out by hand: one pair with beta 0.5 unless said otherwise,

             Δ      tokens   log π(y|x)   r = βΔ    Δ/n    log π / n
chosen       2      4        -2           1         0.5    -0.5
rejected    -1      2        -3          -0.5      -0.5    -1.5
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from dpo_loop.config import KtoLoss, Loss, OrpoLoss, SigmoidLoss
from dpo_loop.training.objectives.losses import (
    Side,
    kto_loss,
    ld_token_weights,
    length_normalised_nll,
    loss_at_reference,
    loss_per_pair,
    rewards,
    wpo_weight,
)


def loss_of(kind: str, **settings: object) -> Any:
    return TypeAdapter(Loss).validate_python({"kind": kind, **settings})


def side(ratio: list[float], *, tokens: list[int], logp: list[float]) -> Side:
    exact = {"dtype": torch.float64}
    return Side(torch.tensor(logp, **exact), torch.tensor(tokens), torch.tensor(ratio, **exact, requires_grad=True))


CHOSEN, REJECTED = side([2], tokens=[4], logp=[-2]), side([-1], tokens=[2], logp=[-3])

BY_HAND: list[tuple[str, dict[str, object], float]] = [
    # margin m = 0.5 * 3: ln(1 + e^-1.5)
    ("sigmoid", {"beta": 0.5}, 0.201413),
    # cDPO, with ln(1 + e^1.5) = 1.701413 for the flipped label: 0.9 of 0.201413 and 0.1 of 1.701413
    ("sigmoid", {"beta": 0.5, "label_smoothing": 0.1}, 0.351413),
    # per token: m = 2 * (0.5 + 0.5), ln(1 + e^-2)
    ("sigmoid_norm", {"beta": 2.0}, 0.126928),
    ("sigmoid_norm", {"beta": 2.0, "label_smoothing": 0.1}, 0.326928),
    # unbiased: 0.9 of 0.201413 less 0.1 of 1.701413, over 0.8
    ("robust", {"beta": 0.5, "label_smoothing": 0.1}, 0.013913),
    # q = σ(1.5) = 0.817574:  q (ln q - ln 0.9) + (1-q) (ln(1-q) - ln 0.1) = 0.817574 * -0.096053 + 0.182426 * 0.601172
    ("exo_pair", {"beta": 0.5, "label_smoothing": 0.1}, 0.031139),
    # 1 - 0.3;  1 - 1.5 < 0
    ("hinge", {"beta": 0.1}, 0.7),
    ("hinge", {"beta": 0.5}, 0.0),
    # (0.5 + 0.5 - 1 / (2 * 0.25))²
    ("ipo", {"beta": 0.25}, 1.0),
    # -ln σ(1) - ½ ln σ(-1) - ½ ln σ(0.5) = 0.313262 + 0.656631 + 0.237038
    ("nca_pair", {"beta": 0.5}, 1.206931),
    # (2 - 0.5)² + (-1 + 0.5)²
    ("sppo_hard", {"beta": 1.0}, 2.5),
    # 1 - σ(1) + σ(-0.5) = 1 - 0.731059 + 0.377541
    ("apo_zero", {"beta": 0.5}, 0.646482),
    # σ(1) + 1 - σ(1.5) = 0.731059 + 1 - 0.817574
    ("apo_down", {"beta": 0.5}, 0.913484),
    # 2 * (-0.5 + 1.5) - 2 * 0.5 = 1: ln(1 + e^-1), and with smoothing 0.1 that + 0.1
    ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}, 0.313262),
    ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5, "label_smoothing": 0.1}, 0.413262),
    # odds of e^-0.5: 0.606531 / 0.393469 = 1.541494; of e^-1.5: 0.287217; NLL 0.5 + 0.1 ln(1 + 0.287217 / 1.541494)
    ("orpo", {"beta": 0.1}, 0.517086),
]


@pytest.mark.parametrize(("kind", "settings", "expected"), BY_HAND)
def test_a_loss_equals_the_hand_derived_value(kind: str, settings: dict[str, object], expected: float) -> None:
    assert loss_per_pair(loss_of(kind, **settings), CHOSEN, REJECTED).tolist() == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        # scores 1 - e^-2 = 0.864665 and 1 - e = -1.718282: ln(1 + e^(-0.5 * 2.582947))
        ("forward_kl", 0.242841),
        # scores ln 2 + ln σ(2) = 0.566219 and ln 2 + ln σ(-1) = -0.620115: ln(1 + e^(-0.5 * 1.186334))
        ("js_divergence", 0.439914),
        # a = 0.5, scores (e^-1 - 1) / -0.5 = 1.264241 and (e^0.5 - 1) / -0.5 = -1.297443: ln(1 + e^(-0.5 * 2.561684))
        ("alpha_divergence", 0.245142),
    ],
)
def test_a_divergence_other_than_the_reverse_kl_equals_the_hand_derived_value(divergence: str, expected: float) -> None:
    loss = loss_of("sigmoid", beta=0.5, f_divergence=divergence)
    assert loss_per_pair(loss, CHOSEN, REJECTED).tolist() == pytest.approx([expected], abs=1e-6)


def test_a_divergence_is_taken_of_the_whole_completion_before_it_is_divided_by_its_tokens() -> None:
    # 0.864665 / 4 + 1.718282 / 2 = 1.075307: (1.075307 - 2)²
    loss = loss_of("ipo", beta=0.25, f_divergence="forward_kl")
    assert loss_per_pair(loss, CHOSEN, REJECTED).tolist() == pytest.approx([0.855057], abs=1e-6)


def test_the_alpha_divergence_of_a_hopeless_completion_is_finite() -> None:
    hopeless = side([-1e4], tokens=[4], logp=[-1e4])
    # cut at (e^80 - 1) / -0.5: the margin is 0.5 * (1.264241 + 2 e^80)
    loss = loss_of("sigmoid", beta=0.5, f_divergence="alpha_divergence")
    assert loss_per_pair(loss, hopeless, CHOSEN).item() == pytest.approx(math.exp(80), rel=1e-6)


def test_kto_weighs_desirable_and_undesirable_examples_by_their_side_of_the_kl() -> None:
    loss = loss_of("kto", beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    both = side([2, -1], tokens=[4, 2], logp=[-2, -3])
    # z0 = 1:  2 (1 - σ(0.5 (2 - 1))) = 2 * (1 - 0.622459)   3 (1 - σ(0.5 (1 + 1))) = 3 * (1 - 0.731059)
    found = kto_loss(loss, both, desirable_B=torch.tensor([True, False]), z0=1.0)
    assert found.tolist() == pytest.approx([0.755081, 0.806824], abs=1e-6)


def test_kto_has_no_loss_of_pairs() -> None:
    with pytest.raises(TypeError, match="single examples"):
        loss_per_pair(loss_of("kto"), CHOSEN, REJECTED)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("sigmoid", {"label_smoothing": 0.2}, math.log(2)),
        ("sigmoid", {"f_divergence": "js_divergence"}, math.log(2)),
        ("sigmoid_norm", {}, math.log(2)),
        ("robust", {"label_smoothing": 0.2}, math.log(2)),
        ("exo_pair", {"label_smoothing": 0.1}, -math.log(2) - 0.5 * math.log(0.9) - 0.5 * math.log(0.1)),
        ("hinge", {}, 1.0),
        ("ipo", {"beta": 0.1}, 25.0),  # (1 / 0.2)²
        ("nca_pair", {}, 2 * math.log(2)),
        ("sppo_hard", {"beta": 0.1}, 50.0),  # 2 (1 / 0.2)²
        ("apo_zero", {}, 1.0),
        ("apo_down", {}, 1.0),
    ],
)
def test_the_loss_at_the_reference_is_known(kind: str, settings: dict[str, object], expected: float) -> None:
    assert loss_at_reference(loss_of(kind, **settings)) == pytest.approx(expected)


EVERY_REFERENCED_LOSS = sorted({kind for kind, _, _ in BY_HAND} - {"simpo", "orpo"})


@pytest.mark.parametrize("kind", EVERY_REFERENCED_LOSS)
def test_the_first_step_raises_chosen_over_rejected(kind: str) -> None:
    chosen, rejected = side([0], tokens=[3], logp=[-5]), side([0], tokens=[4], logp=[-5])
    loss_per_pair(loss_of(kind), chosen, rejected).sum().backward()
    assert chosen.log_ratio_B.grad.item() < rejected.log_ratio_B.grad.item()


def test_the_gradient_at_zero_is_minus_half_beta_on_chosen_and_plus_half_beta_on_rejected() -> None:
    # d/dΔ_chosen of -ln σ(β d) = -β σ(-β d), and σ(0) = 1/2
    chosen, rejected = side([0], tokens=[3], logp=[-5]), side([0], tokens=[4], logp=[-5])
    loss_per_pair(loss_of("sigmoid", beta=0.1), chosen, rejected).sum().backward()
    assert (chosen.log_ratio_B.grad.item(), rejected.log_ratio_B.grad.item()) == pytest.approx((-0.05, 0.05))


@given(chosen=st.floats(-50, 50), rejected=st.floats(-50, 50), kind=st.sampled_from(EVERY_REFERENCED_LOSS))
def test_swapping_chosen_and_rejected_negates_the_margin(chosen: float, rejected: float, kind: str) -> None:
    loss = loss_of(kind)
    one, two = side([chosen], tokens=[3], logp=[-3]), side([rejected], tokens=[7], logp=[-4])
    margin = (rewards(loss, one) - rewards(loss, two)).item()
    assert (rewards(loss, two) - rewards(loss, one)).item() == -margin
    if isinstance(loss, SigmoidLoss):  # softplus(-m) - softplus(m) = -m
        swapped = loss_per_pair(loss, one, two) - loss_per_pair(loss, two, one)
        assert swapped.item() == pytest.approx(-margin, abs=1e-9)


@given(order=st.permutations(range(5)), kind=st.sampled_from([*EVERY_REFERENCED_LOSS, "simpo", "orpo"]))
def test_a_pair_has_the_same_loss_beside_any_others(order: list[int], kind: str) -> None:
    chosen = side([3, -0.2, 7, 0, -9], tokens=[1, 2, 3, 4, 5], logp=[-1, -2, -3, -4, -5])
    rejected = side([-3, 0.2, 1, 0, 4], tokens=[5, 4, 3, 2, 1], logp=[-9, -8, -7, -6, -5])
    loss = loss_of(kind)
    shuffled = [Side(*(values[order] for values in each[:3])) for each in (chosen, rejected)]
    assert loss_per_pair(loss, *shuffled).tolist() == loss_per_pair(loss, chosen, rejected)[order].tolist()


def test_a_hopeless_pair_has_a_finite_loss() -> None:
    low, high = side([-1e4], tokens=[1], logp=[-1e4]), side([1e4], tokens=[1], logp=[-1])
    assert loss_per_pair(loss_of("sigmoid", beta=1.0), low, high).item() == pytest.approx(2e4)


def test_orpo_of_a_certain_completion_is_finite_with_its_gradient() -> None:
    """fp32 log-probs of a completion that the model knows by heart are exactly 0: the odds would be infinite and the gradient NaN."""
    logp = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = loss_per_pair(OrpoLoss(kind="orpo"), Side(logp, torch.tensor([3]), None), REJECTED)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert logp.grad.item() == pytest.approx(-1 / 3)  # of the NLL alone


def test_a_loss_without_its_reference_is_refused() -> None:
    bare = Side(torch.tensor([-1.0]), torch.tensor([1]), None)
    with pytest.raises(AssertionError, match="needs a reference"):
        rewards(KtoLoss(kind="kto"), bare)


def test_nll_is_per_token_of_each_sequence() -> None:
    # four tokens of probability 1/2, one token of probability 1/4
    logps = torch.tensor([4 * math.log(0.5), math.log(0.25)])
    assert length_normalised_nll(logps, torch.tensor([4, 1])).tolist() == pytest.approx([0.693147, 1.386294], abs=1e-6)


def test_tokens_beyond_the_shorter_completion_weigh_alpha() -> None:
    chosen, rejected = ld_token_weights(0.25, 5, 2)
    assert chosen.tolist() == [1, 1, 0.25, 0.25, 0.25]
    assert rejected.tolist() == [1, 1]
    assert [weights.tolist() for weights in ld_token_weights(0.0, 1, 3)] == [[1], [1, 0, 0]]


def test_wpo_weighs_a_pair_by_how_likely_both_of_its_completions_are() -> None:
    chosen = CHOSEN._replace(alignment_B=torch.tensor([math.log(0.5)]))
    rejected = REJECTED._replace(alignment_B=torch.tensor([math.log(0.2)]))
    assert wpo_weight(chosen, rejected).tolist() == pytest.approx([0.1])
