"""What every stage with an engine does first: look at the policy's files, and let the engine prove that it serves them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_loop.config import EngineConfig
from dpo_loop.errors import PolicyError
from dpo_loop.generation.canary import Canary, check_canary
from dpo_loop.generation.engine import Engine
from dpo_loop.policies import adapter_problems, adapter_sha256, model_problems
from dpo_loop.progress import say
from dpo_loop.types import PolicyRef


def prove(name: str, engine: Engine, canary: Canary | None, config: EngineConfig) -> dict[str, Any] | None:
    """Figures of the canary, None where a bare base has none. Raises CanaryError if the engine does not serve the policy."""
    if canary is None:
        say(f"{name}: the policy is a bare base without canary.json; its log-probs were not compared")
        return None
    # One token less than the context: an engine scores a sequence by asking for the token after it.
    figures = check_canary(engine, canary, tolerance=config.canary_tolerance, max_tokens=config.max_model_len - 1)
    say(f"{name}: canary passed: {figures}")
    return asdict(figures)


def check_policy(policy: PolicyRef, config: EngineConfig) -> None:
    """Raises PolicyError with everything that would keep an engine from serving this policy, before one is started."""
    base = Path(policy.base)
    problems = model_problems(base) if base.is_dir() else []
    if policy.adapter is not None:
        adapter = Path(policy.adapter)
        problems += adapter_problems(adapter, base, base_sha256=policy.base_sha256, max_rank=config.max_lora_rank)
        if not problems and adapter_sha256(adapter) != policy.adapter_sha256:
            problems.append(
                f"{adapter} has changed since the policy was described: its sha256 differs; restore it, or make it anew"
            )
    if problems:
        raise PolicyError(
            "\n".join([f"the policy at {policy.adapter or policy.base} cannot be served:", *(f"  - {p}" for p in problems)])
        )
