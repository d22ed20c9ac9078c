"""Pairs that are not trained on: which they are, and which look at them was the best."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_loop.config import HeldOutConfig
from dpo_loop.types import PreferencePair


def held_out_rows(pairs: Sequence[PreferencePair], config: HeldOutConfig, *, seed: int) -> list[int]:
    """Rows to hold out, ascending: a pure function of the seed and the prompts. Pairs of one prompt are on the same side, and at most half
    of all are held out. Empty if that would be fewer than config.min_pairs."""
    rows_of = _by_prompt(pairs)
    room = min(int(config.share * len(pairs)), config.max_pairs, len(pairs) // 2)
    taken: list[int] = []
    for prompt_id in sorted(rows_of, key=lambda prompt_id: hashlib.sha256(f"{seed}/{prompt_id}".encode()).digest()):
        if len(taken) + len(rows_of[prompt_id]) <= room:
            taken += rows_of[prompt_id]
    return sorted(taken) if len(taken) >= config.min_pairs else []


def _by_prompt(pairs: Sequence[PreferencePair]) -> dict[str, list[int]]:
    """Rows that share a prompt, under the least of its ids. Prompts are one if their tokens are, whatever their ids say: merged sets know the
    same prompt under several. They are also one if their id is."""
    leader: dict[Any, Any] = {}

    def find(name: Any) -> Any:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for pair in pairs:
        leader[find(pair.prompt_token_ids)] = find(pair.prompt_id)
    groups: dict[Any, list[int]] = defaultdict(list)
    for row, pair in enumerate(pairs):
        groups[find(pair.prompt_id)].append(row)
    return {min(pairs[row].prompt_id for row in rows): rows for rows in groups.values()}


class BestLook:
    """The look with the lowest held-out loss, with the weights of its moment; they are kept only if there is a patience.

    step: 0 before the first look whose loss was finite.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.loss, self.step, self.looks_since = math.inf, 0, 0
        self.weights: dict[str, Tensor] = {}

    @property
    def is_over(self) -> bool:
        """Whether so many looks in a row found nothing better that training ends."""
        return self.patience is not None and self.looks_since >= self.patience

    def see(self, loss: float, *, step: int, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """step: optimizer steps done, at least 1."""
        if not loss < self.loss:
            self.looks_since += 1
            return
        self.loss, self.step, self.looks_since = loss, step, 0
        if self.patience is not None:
            self.weights = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}

    def restore(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Put the weights of that look into `parameters`, if they were kept."""
        put(self.weights, parameters)

    def state(self) -> dict[str, Any]:
        return {"loss": self.loss, "step": self.step, "looks_since": self.looks_since, "weights": self.weights}

    def load(self, state: Mapping[str, Any]) -> None:
        self.loss, self.step, self.looks_since = state["loss"], state["step"], state["looks_since"]
        self.weights = dict(state["weights"])


def put(weights: Mapping[str, Tensor], parameters: Mapping[str, torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
