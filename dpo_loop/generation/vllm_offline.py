"""vLLM in this process: token ids in and out, the policy's adapter as a LoRARequest.

Import it through `engine.open_engine`, which sets the environment that vllm reads while it is imported. One code path for CPU and
GPU builds; on a CPU `dtype: auto` means float32 (what the trainer uses there) and execution is always eager.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from dpo_loop.config import EngineConfig
from dpo_loop.errors import PolicyError
from dpo_loop.generation.engine import Answer, Ask, Sampling
from dpo_loop.generation.lines import ProgressLines
from dpo_loop.types import FinishReason, PolicyRef

_LORA_RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks vLLM has buffers for; it pads an adapter to the engine's, and computes the padding too."""

_CPU_BLOCK_TOKENS = 128
"""Tokens per block of the CPU backend's KV cache."""


class VllmOffline:
    def __init__(self, policy: PolicyRef, config: EngineConfig, *, on_cpu: bool, started: float) -> None:
        """started: time.monotonic() before vllm was imported. Raises PolicyError with vLLM's reason if it cannot serve the policy."""
        # Says on every start that Triton is missing, which no CPU build has.
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
        self._lora = None
        if policy.adapter is not None:
            # The name is part of the prefix cache's keys, so it says which weights these are.
            self._lora = LoRARequest(policy.adapter_sha256 or policy.adapter, 1, policy.adapter)
        if on_cpu:
            name = f"{OneAdapterOnCpu.__module__}.{OneAdapterOnCpu.__qualname__}"
            type(current_platform).get_punica_wrapper = classmethod(lambda _: name)
        try:
            self._llm = LLM(**_arguments(policy, config, on_cpu=on_cpu))
            if self._lora is not None:
                self._llm.llm_engine.add_lora(self._lora)
        except ValueError as error:
            raise PolicyError(f"vLLM cannot serve the policy at {policy.adapter or policy.base}: {error}") from error
        self._eos_token_id: int | None = self._llm.get_tokenizer().eos_token_id
        self.start_s = time.monotonic() - started

    def sample(self, asks: Sequence[Ask], sampling: Sampling, *, stage: str) -> list[Answer]:
        # Blocks of earlier calls would change which tokens are computed together, and with that the last bits of the logits.
        self._llm.reset_prefix_cache()
        self._llm.enqueue(
            [{"prompt_token_ids": list(ask.prompt_token_ids)} for ask in asks],
            [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens,
                    seed=ask.seed,
                    logprobs=0,
                    detokenize=False,
                )
                for ask in asks
            ],
            lora_request=self._lora,
            use_tqdm=False,
        )
        requests = self._llm.wait_for_completion(use_tqdm=partial(ProgressLines, stage=stage))
        return [self._answer(request.outputs[0]) for request in requests]

    def score(self, sequences: Sequence[tuple[int, ...]], *, with_adapter: bool) -> list[list[float]]:
        self._llm.reset_prefix_cache()
        requests = self._llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in sequences],
            SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False),
            lora_request=self._lora if with_adapter else None,
            use_tqdm=False,
        )
        return [
            [position[token].logprob for token, position in zip(ids[1:], request.prompt_logprobs[1:], strict=True)]
            for ids, request in zip(sequences, requests, strict=True)
        ]

    def _answer(self, sampled: Any) -> Answer:
        token_ids = tuple(sampled.token_ids)
        reason = FinishReason(sampled.finish_reason)
        end = sampled.stop_reason if isinstance(sampled.stop_reason, int) else self._eos_token_id
        if reason is FinishReason.STOP and end is not None and token_ids[-1:] != (end,):
            token_ids = (*token_ids, end)
        return Answer(token_ids=token_ids, finish_reason=reason, logprob=float(sampled.cumulative_logprob))


def _arguments(policy: PolicyRef, config: EngineConfig, *, on_cpu: bool) -> dict[str, Any]:
    """Engine arguments of vLLM."""
    arguments: dict[str, Any] = {
        "model": policy.base,
        "revision": policy.revision,
        "dtype": "float32" if on_cpu and config.dtype == "auto" else config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel,
        "enforce_eager": on_cpu or config.enforce_eager,
        "enable_prefix_caching": True,
        # Before temperature and top_p: what the trainer computes.
        "logprobs_mode": "raw_logprobs",
        "use_tqdm_on_load": False,
    }
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = min(config.cpu_kvcache_gib << 30, _most_kv_bytes(policy, config))
        # A prompt cut into chunks rewinds its seeded generator, which torch's CPU generator cannot do.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(4_096, config.max_model_len)
    else:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
    if policy.adapter is not None:
        rank = json.loads((Path(policy.adapter) / "adapter_config.json").read_text())["r"]
        arguments |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": next(served for served in _LORA_RANKS if served >= rank),
            # Without this vLLM also wraps the head, which costs rank x vocabulary per token and, on a CPU, breaks prompt log-probs.
            "lora_target_modules": _adapted_modules(Path(policy.adapter)),
        }
    return arguments


def _most_kv_bytes(policy: PolicyRef, config: EngineConfig) -> int:
    """What a cache can hold at most that a batch of the longest sequences fills: vLLM zeroes all of it, about a second per GiB."""
    shape = AutoConfig.from_pretrained(policy.base, revision=policy.revision).get_text_config()
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    per_token = 2 * shape.num_hidden_layers * heads * head * 4
    blocks = config.max_num_seqs * math.ceil(config.max_model_len / _CPU_BLOCK_TOKENS)
    # vLLM keeps one block for itself.
    return int((blocks + 2) * _CPU_BLOCK_TOKENS * per_token)


def _adapted_modules(adapter: Path) -> list[str]:
    """Last part of the name of every module the adapter has weights for: q_proj, down_proj …"""
    with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as weights:
        modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights.keys() if ".lora_" in name}  # noqa: SIM118
    if unprovable := modules & {"lm_head", "embed_tokens"}:
        raise PolicyError(
            f"{adapter} adapts {', '.join(sorted(unprovable))}; vLLM leaves that out of prompt log-probs (on a CPU it fails), so the canary "
            "could not show that it is served. Train an adapter of the inner linear layers (training.lora.target: all-linear)."
        )
    return sorted(modules)


class OneAdapterOnCpu(PunicaWrapperCPU):  # type: ignore[misc]
    """LoRA on a CPU where every request of a batch uses the one adapter, or none does.

    vLLM 0.32's CPU kernels copy the adapter once per token before they multiply; a 3M-parameter model generated 5 times slower with an
    adapter than without. The sums are the same: y += scale (x A^T) B^T for each of a packed layer's slices (q, k, v).
    """

    def add_lora_linear(
        self, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, output_slices: Any, **_: Any
    ) -> None:
        """y: tokens x outputs, changed in place. x: tokens x inputs. A: 1 x 1 x rank x inputs, B: 1 x 1 x outputs x rank, per slice."""
        if self.no_lora:
            return
        x, y = x.view(-1, x.shape[-1]).float(), y.view(-1, y.shape[-1])
        offset = 0
        for lora_a, lora_b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            low = scale * (x @ lora_a[0, 0].float().T)
            y[:, offset : offset + size] += low.to(y.dtype) @ lora_b[0, 0].to(y.dtype).T
            offset += size
