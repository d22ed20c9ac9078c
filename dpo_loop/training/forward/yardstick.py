"""By what a forward of ours is judged: the log-probs of separate forwards, and how far another right computation of them may be off.

In fp32 right forwards agree to a few roundings, in bf16 to a few hundredths of a nat, which is as much as a wrong neighbour may change. So
the roundings of the model at hand are measured: the same forwards once more, the output of every layer off by up to one rounding.

Shapes: N completion tokens of all sequences, D draws of roundings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

_TIMES = 3.0
"""Roundings of another kernel may be this many times as large as those that were measured. Over tiny models in bf16, right rows were off by less
than the measured ones, and rows with a wrong neighbour by five to forty times as much; experts chosen otherwise bring the two nearer."""
_DRAWS_BELOW = 3
"""In lower precision than fp32, where now and then a token meets another expert: one draw may miss all of them."""
_ALLOWED = {torch.float32: 1e-4}
_ALLOWED_BELOW = 1e-3
"""What is allowed in any case, of fp32 and of lower precision: relative to a log-prob where that is above 1."""
_LAYERS = (torch.nn.Linear, torch.nn.Embedding, Conv1D)


@dataclass(frozen=True)
class Yardstick:
    expected_N: Tensor
    rounding_DN: Tensor
    """|difference| of the same forwards with other roundings."""
    region_N: Tensor
    """Tokens of one number are judged together: what goes wrong past a window must not be averaged away."""
    allowed: float

    def compare(self, logps_N: Tensor) -> tuple[float, float]:
        """(largest difference, its excess): up to 1 is right. Mean and maximum of each region are judged; NaN is infinitely wrong."""
        off_N = torch.nan_to_num(difference(logps_N, self.expected_N), nan=float("inf"))
        excess = 0.0
        for region in torch.unique(self.region_N):
            off, rounding = off_N[self.region_N == region], self.rounding_DN[:, self.region_N == region]
            for statistic in (torch.mean, torch.max):
                excess = max(excess, float(statistic(off) / (self.allowed + _TIMES * statistic(rounding))))
        return float(off_N.max()), excess


def num_draws(kind: torch.dtype) -> int:
    return 1 if kind in _ALLOWED else _DRAWS_BELOW


def allowed_in(kind: torch.dtype) -> float:
    return _ALLOWED.get(kind, _ALLOWED_BELOW)


def difference(logps_N: Tensor, expected_N: Tensor) -> Tensor:
    """Relative where a log-prob is above 1."""
    return (logps_N - expected_N).abs() / expected_N.abs().clamp(min=1)


def computed_in(model: Any, device: torch.device) -> torch.dtype:
    """The type of products: autocast's, else that of the weights."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    kind: torch.dtype = next(each.dtype for each in model.parameters() if each.is_floating_point())
    return kind


@contextmanager
def other_roundings(model: Any, device: torch.device, *, seed: int) -> Iterator[None]:
    """Every output of an embedding or of a linear layer off by up to half a unit in the last place, by the numbers of the seed."""
    unit = torch.finfo(computed_in(model, device)).eps
    draw = torch.Generator(device).manual_seed(seed)

    def push(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):  # a router that is a linear layer by class
            return output
        off = torch.rand(output.shape, generator=draw, device=output.device) - 0.5
        return (output.float() * (1 + unit * off)).to(output.dtype)

    handles = [module.register_forward_hook(push) for module in model.modules() if isinstance(module, _LAYERS)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
