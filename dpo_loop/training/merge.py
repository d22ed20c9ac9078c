"""A policy as one model for shipping: base and adapter merged once, in fp32, from the base, and compared with base + adapter.

Two proofs: the log-probs of the merged model are those that training left in the canary, and its logits are those of base + adapter. The
files are loaded again and compared too. It runs on the CPU whatever else there is: it happens once, and a GPU whose engine is
serving has no room for a base in fp32.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from dpo_loop.errors import PolicyError
from dpo_loop.progress import say
from dpo_loop.training.canary import everyday_sequences, pick_sequences
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.types import PolicyRef, Record

disable_progress_bar()  # lines, not bars

StoredDtype = Literal["float32", "bfloat16"]
TOLERANCE = 1e-3
"""Between logits of fp32 models whose weights are the same in another order of additions."""
_NOISE = 1e-5
"""Differences below this are never told from an adapter's effect."""
_MAX_SHARE = 0.1
"""Of the adapter's effect, that a merge may lose: else an adapter smaller than the tolerance could be lost unseen."""
_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json", _GENERATION_CONFIG,
)  # fmt: skip
"""Tokenizer, chat template and generation defaults, copied byte by byte: saving them anew may change them. What else lies beside a base is
not the model's, and stays where it is."""
_MORE_TEMPLATES = "additional_chat_templates"


class MergeFigures(Record):
    """Largest differences of logits, over the completions of the canary's sequences."""

    num_sequences: int
    num_tokens: int
    adapter_effect: float
    """What the adapter changes; 0 without one."""
    merge_difference: float
    """Merged model and base + adapter, in fp32."""
    allowed: float
    """For both fp32 comparisons."""
    canary_distance: float | None
    """Mean |log-prob - canary's|, nats per token; None for a policy without a canary."""
    stored_dtype: StoredDtype
    stored_difference: float
    """The files as written, loaded again, and base + adapter in fp32."""


def merge(policy: PolicyRef, out: Path, *, dtype: StoredDtype = "float32", tolerance: float = TOLERANCE) -> MergeFigures:
    """Write model, tokenizer and chat template to `out`, which is empty or does not exist. A policy without an adapter is its base, saved in `dtype`.

    Raises PolicyError, with the figures, for a merge that is not what it should be; what is in `out` then is to be thrown away.
    """
    sequences, recorded, canary_tolerance = _canary(policy)
    say(f"merge: loading {policy.base} in float32")
    model = _load(Path(policy.base))
    wanted = bare = _logits(model, sequences)
    if policy.adapter is not None:
        adapted = PeftModel.from_pretrained(model, policy.adapter).eval()
        wanted = _logits(adapted, sequences)
        say("merge: merging the adapter")
        model = _merged(adapted, policy.adapter)
        del adapted
    merged = _logits(model, sequences)
    effect, difference = _largest(wanted, bare), _largest(merged, wanted)
    allowed = min(tolerance, max(_NOISE, _MAX_SHARE * effect)) if policy.adapter is not None else tolerance
    where = policy.adapter or policy.base
    _check("the merged model and base + adapter", where, difference, allowed)
    distance = _distance(merged, sequences, recorded)
    if distance is not None:
        _check("the merged model and the canary that training left", where, distance, canary_tolerance)
    _save(model, out, dtype=dtype, like=Path(policy.base))
    del model
    gc.collect()  # one model in memory at a time
    say("merge: loading what was written, to compare it")
    stored = _largest(_logits(_load(out), sequences), wanted)
    if dtype == "float32":
        _check("the files as written and base + adapter", where, stored, allowed)
    return MergeFigures(
        num_sequences=len(sequences),
        num_tokens=sum(len(sequence.completion) for sequence in sequences),
        adapter_effect=effect,
        merge_difference=difference,
        allowed=allowed,
        canary_distance=distance,
        stored_dtype=dtype,
        stored_difference=stored,
    )


def _canary(policy: PolicyRef) -> tuple[list[TokenSequence], list[list[float]] | None, float]:
    """The canary's sequences, their log-probs and its tolerance; sequences of our own for a policy without one."""
    if policy.canary is None:
        return pick_sequences(everyday_sequences(AutoTokenizer.from_pretrained(policy.base))), None, 0.0
    canary = json.loads(Path(policy.canary).read_bytes())
    if (canary["base_sha256"], canary["adapter_sha256"]) != (policy.base_sha256, policy.adapter_sha256):
        raise PolicyError(f"{policy.canary} was made for another policy than the one at {policy.adapter or policy.base}")
    rows = canary["sequences"]
    sequences = [TokenSequence(tuple(row["prompt_token_ids"]), tuple(row["token_ids"])) for row in rows]
    return sequences, [row["policy_logprobs"] for row in rows], canary["tolerance_hint"]


def _load(path: Path) -> Any:
    # eager: transformers' sdpa silently drops the attention soft-cap of Gemma 2.
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def _merged(adapted: Any, adapter: str) -> Any:
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise PolicyError(
            f"{adapter} cannot be merged: {error}. Its weights are damaged; restore them or train the round anew."
        ) from error


def _logits(model: Any, sequences: Sequence[TokenSequence]) -> list[Tensor]:
    """fp32 [N, V] of each sequence: what predicts its completion's N tokens."""
    found = []
    with torch.inference_mode():
        for prompt, completion in sequences:
            ids_1L = torch.tensor([prompt + completion[:-1]])
            found.append(model(input_ids=ids_1L, use_cache=False).logits[0, len(prompt) - 1 :].float().clone())
    return found


def _largest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """NaN, which no tolerance admits, where a logit is none."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]).max())


def _distance(logits: Sequence[Tensor], sequences: Sequence[TokenSequence], recorded: list[list[float]] | None) -> float | None:
    if recorded is None:
        return None
    differences = []
    for logits_NV, sequence, row in zip(logits, sequences, recorded, strict=True):
        targets_N = torch.tensor(sequence.completion)
        logps_N = logits_NV.gather(1, targets_N[:, None]).squeeze(1) - logits_NV.logsumexp(dim=1)
        differences.append((logps_N - torch.tensor(row)).abs())
    return float(torch.cat(differences).mean())


def _check(what: str, where: str, difference: float, allowed: float) -> None:
    if not difference <= allowed:
        raise PolicyError(
            f"{what} differ by {difference:.2e}, above {allowed:.2e}; nothing of {where} was exported. Export the adapter itself "
            "(`--what adapter`), which needs no merge, or make the round's training anew if its files were changed."
        )


def _save(model: Any, out: Path, *, dtype: StoredDtype, like: Path) -> None:
    model.generation_config = GenerationConfig()  # saving one that transformers finds odd fails; the base's file is copied as it is
    model.to(getattr(torch, dtype)).save_pretrained(out)
    (out / _GENERATION_CONFIG).unlink()
    templates = (f"{_MORE_TEMPLATES}/{path.name}" for path in sorted((like / _MORE_TEMPLATES).glob("*.jinja")))
    for name in (*_COMPANIONS, *templates):
        if (like / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(like / name, out / name)
    mode = (out / _CONFIG).stat().st_mode
    for path in out.glob("*.safetensors"):
        path.chmod(mode)  # safetensors lets nobody but the owner read them
