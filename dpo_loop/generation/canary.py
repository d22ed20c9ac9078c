"""The adapter-effective canary: does the engine serve the policy that it was given?

An engine can load an adapter and serve the bare base all the same (vllm#55193, #34186: target modules that match nothing are skipped
without a word). So the stage that made a policy leaves `canary.json`: token sequences with their log-probs by transformers+peft
under the policy and under its bare base. Before anything is generated the engine scores the same ids, with the adapter and without.

Two figures decide (sums over all canary tokens; p, b: file's log-probs of policy and base; v, u: engine's, with and without adapter):
- distance  mean |v - p|, which a right engine keeps below `canary_tolerance`: numerics differ, weights do not;
- effect    <v - u, p - b> / <p - b, p - b>: 1 where the adapter does what it does in peft, 0 where it does nothing. Below 1/2 the
            engine is closer to its base than to the policy. Engine noise cancels in v - u, so this sees adapters far smaller than the
            tolerance; it is left out (None) where p - b drowns in the noise u - b all the same.

Figures that are no numbers (a log-prob that is NaN or infinite, in the file or from the engine) show nothing, so they do not pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_loop.errors import CanaryError, PolicyError
from dpo_loop.exchange import MIN_EFFECT
from dpo_loop.generation.engine import Scorer
from dpo_loop.types import PolicyRef, Record

NOISE_FACTOR = 8.0
"""p - b must be this many times the noise expected in its direction, else the effect says nothing."""


class CanarySequence(Record):
    """Log-probs are those of token_ids after prompt_token_ids, nats, fp32, temperature 1. base_logprobs: None without an adapter."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    policy_logprobs: tuple[float, ...]
    base_logprobs: tuple[float, ...] | None


class Canary(Record):
    base_sha256: str
    adapter_sha256: str | None
    tolerance_hint: float | None = None
    sequences: tuple[CanarySequence, ...]


@dataclass(frozen=True, slots=True)
class CanaryFigures:
    num_tokens: int
    distance: float
    """Mean |engine - transformers+peft|, nats per token."""
    base_distance: float | None
    """The same for the bare base."""
    effect: float | None
    """Share of the adapter's effect that the engine shows; None without an adapter, or where it cannot be told from noise."""

    def __str__(self) -> str:
        effect = "" if self.effect is None else f", adapter effect {self.effect:.3f} of 1"
        base = "" if self.base_distance is None else f", {self.base_distance:.2e} for the bare base"
        return f"mean |engine - transformers+peft| {self.distance:.2e} nats over {self.num_tokens} tokens{base}{effect}"


def read_canary(policy: PolicyRef) -> Canary | None:
    """The policy's canary; None for a bare base that has none. Raises PolicyError if it is missing or another policy's."""
    where = policy.adapter or policy.base
    if policy.canary is None:
        if policy.adapter is None:
            return None
        raise PolicyError(
            f"the policy at {where} has an adapter but no canary.json, so nothing can show that the engine serves it. "
            "Stages `seed` and `train` write one; begin the run with this adapter as its start policy."
        )
    path = Path(policy.canary)
    if not path.is_file():
        raise PolicyError(f"{path}, the canary of the policy at {where}, is missing; make the stage that wrote it anew")
    canary = Canary.model_validate_json(path.read_bytes())
    made_for = (canary.base_sha256, canary.adapter_sha256)
    if made_for != (policy.base_sha256, policy.adapter_sha256):
        raise PolicyError(f"{path} was made for another policy than the one at {where}: its weights have other sha256s")
    return canary


def check_canary(engine: Scorer, canary: Canary, *, tolerance: float, max_tokens: int) -> CanaryFigures:
    """Score the canary's sequences with `engine`. Raises CanaryError, with the figures, if it does not serve the policy.

    max_tokens: longer sequences do not fit into the engine and are left out.
    """
    fitting = tuple(s for s in canary.sequences if len(s.prompt_token_ids) + len(s.token_ids) <= max_tokens)
    if not fitting:
        raise CanaryError(
            f"none of the {len(canary.sequences)} canary sequences has at most {max_tokens} tokens, so nothing can show that the engine "
            "serves the policy. Raise engine.max_model_len."
        )
    canary = canary.model_copy(update={"sequences": fitting})
    sequences = [(*s.prompt_token_ids, *s.token_ids) for s in canary.sequences]
    served = _completion_part(canary, engine.score(sequences, with_adapter=True))
    policy = [x for s in canary.sequences for x in s.policy_logprobs]
    base = [x for s in canary.sequences for x in s.base_logprobs or ()]
    distance = _mean_abs(served, policy)
    if len(base) == len(policy):
        bare = _completion_part(canary, engine.score(sequences, with_adapter=False))
        figures = CanaryFigures(len(policy), distance, _mean_abs(bare, base), _effect(served, bare, policy, base))
    else:
        figures = CanaryFigures(len(policy), distance, None, None)
    if not all(math.isfinite(x) for x in (figures.distance, figures.base_distance, figures.effect) if x is not None):
        raise CanaryError(
            f"log-probs that are no numbers cannot show that the engine serves the policy: {figures}. Nothing was generated. Either the engine "
            "computes them (weights that are broken, a dtype that is too small), or canary.json holds them: then make the policy anew."
        )
    if figures.effect is not None and not figures.effect >= MIN_EFFECT:
        raise CanaryError(
            f"the engine does not apply the policy's adapter: its log-probs are those of the bare base. {figures}. "
            "Nothing was generated. Check that the adapter's target modules exist in the engine's model."
        )
    if not distance <= tolerance:
        raise CanaryError(
            f"the engine does not serve this policy: {figures}; the tolerance is {tolerance:g}. Nothing was generated. Other weights, "
            "another tokenizer or a kernel that differs can do this; if it is only numerics, raise engine.canary_tolerance."
        )
    return figures


def _completion_part(canary: Canary, logprobs: Sequence[Sequence[float]]) -> list[float]:
    """Of log-probs of tokens 1..n-1, those of each sequence's completion, one after another."""
    return [x for s, row in zip(canary.sequences, logprobs, strict=True) for x in row[len(row) - len(s.token_ids) :]]


def _mean_abs(a: Sequence[float], b: Sequence[float]) -> float:
    """NaN, which no tolerance admits, for an empty canary or a non-finite log-prob."""
    return math.fsum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a) if a else math.nan


def _effect(served: Sequence[float], bare: Sequence[float], policy: Sequence[float], base: Sequence[float]) -> float | None:
    """None where it drowns in noise; NaN where something is not finite, which is no noise."""
    if not all(math.isfinite(x) for x in (*served, *bare, *policy, *base)):
        return math.nan
    wanted = [p - b for p, b in zip(policy, base, strict=True)]
    size = math.sqrt(_dot(wanted, wanted))
    noise = [u - b for u, b in zip(bare, base, strict=True)]
    noise_per_token = math.sqrt(_dot(noise, noise) / len(noise))
    if size <= NOISE_FACTOR * max(noise_per_token, 1e-6):
        return None
    return _dot([v - u for v, u in zip(served, bare, strict=True)], wanted) / size**2


def _dot(a: Iterable[float], b: Iterable[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))
