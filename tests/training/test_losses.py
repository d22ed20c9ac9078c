"""Losses against values worked out by hand."""

import math

import pytest
import torch

from dpo_loop.training.losses import length_normalised_nll, sigmoid_loss


def test_sigmoid_loss_equals_the_hand_derived_values() -> None:
    # beta 0.5, d = chosen - rejected:   0 → ln 2;   2 → ln(1 + e^-1);   -4 → ln(1 + e^2)
    chosen = torch.tensor([3.0, 1.5, -3.0])
    rejected = torch.tensor([3.0, -0.5, 1.0])
    expected = [0.693147, 0.313262, 2.126928]
    assert sigmoid_loss(chosen, rejected, beta=0.5).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_at_zero_is_minus_half_beta_on_chosen_and_plus_half_beta_on_rejected() -> None:
    # d/dΔ_chosen of -ln σ(β d) = -β σ(-β d), and σ(0) = 1/2
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    sigmoid_loss(chosen, rejected, beta=0.1).sum().backward()
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.05, 0.05))


def test_swapping_chosen_and_rejected_negates_the_margin() -> None:
    one, two = torch.tensor([0.7]), torch.tensor([-1.3])
    difference = sigmoid_loss(one, two, beta=1.0) - sigmoid_loss(two, one, beta=1.0)  # softplus(-d) - softplus(d) = -d
    assert difference.item() == pytest.approx(-2.0)


def test_a_hopeless_pair_has_a_finite_loss() -> None:
    assert sigmoid_loss(torch.tensor([-1e4]), torch.tensor([1e4]), beta=1.0).item() == pytest.approx(2e4)


def test_nll_is_per_token_of_each_sequence() -> None:
    # four tokens of probability 1/2, one token of probability 1/4
    logps = torch.tensor([4 * math.log(0.5), math.log(0.25)])
    assert length_normalised_nll(logps, torch.tensor([4, 1])).tolist() == pytest.approx([0.693147, 1.386294], abs=1e-6)
