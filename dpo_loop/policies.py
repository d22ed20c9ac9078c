"""Policies on disk: written with relative paths so a run directory can move, checked by name before an engine is started."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_loop.artifacts import fingerprint, sha256_file
from dpo_loop.errors import CorruptArtifactError, PolicyError
from dpo_loop.files import read_json, write_json
from dpo_loop.types import Blessing, PolicyRef, canonical_json
from dpo_loop.weights import adapter_weight_problems, base_weight_problems

POLICY_FILE = "policy.json"
ADAPTER_ORIGIN = "dpo_loop.json"
"""Beside an adapter's weights: {"base_sha256": ...}, the base it was trained on."""
_PATH_FIELDS = ("base", "adapter", "canary")
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways to start an adapter that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ … change its weights whenever PEFT loads the adapter."""
_NOT_CONTINUED = {
    "bias": "trains biases of the base",
    "lora_bias": "has biases of its own",
    "modules_to_save": "holds whole modules (often the head or the embeddings)",
    "trainable_token_indices": "holds trained embeddings of some tokens",
    "rank_pattern": "has another rank in some modules",
    "target_parameters": "adapts fused parameters (experts), not linear layers",
    "layer_replication": "repeats layers of the base",
    "alora_invocation_tokens": "is an activated LoRA",
    "use_qalora": "is a QALoRA",
    "use_bdlora": "is a block-diagonal LoRA",
    "arrow_config": "is an Arrow router",
    "kasa_config": "is a KaSA adapter",
    "monteclora_config": "is a MonteCLoRA adapter",
    "velora_config": "is a VeLoRA adapter",
}
"""Keys of an adapter's config whose use means that it is more than LoRA on linear layers, which is all that training and engines share."""


def describe_policy(
    base: Path, *, revision: str | None = None, adapter: Path | None = None, canary: Path | None = None
) -> PolicyRef:
    """A PolicyRef with its hashes, after checking both directories. Raises PolicyError with every problem found."""
    problems = model_problems(base)
    if adapter is not None:
        problems += adapter_problems(adapter, base)
    if problems:
        raise PolicyError("\n".join([f"the policy at {adapter or base} cannot be used:", *(f"  - {line}" for line in problems)]))
    return PolicyRef(
        base=str(base),
        revision=revision,
        base_sha256=fingerprint(base)["sha256"],
        adapter=None if adapter is None else str(adapter),
        adapter_sha256=None if adapter is None else adapter_sha256(adapter),
        canary=None if canary is None else str(canary),
    )


def adapter_sha256(adapter: Path) -> str:
    """Over what an engine loads: the weights and the shape, not the README beside them."""
    files = {name: sha256_file(adapter / name) for name in ("adapter_config.json", "adapter_model.safetensors")}
    return hashlib.sha256(canonical_json(files).encode()).hexdigest()


def model_problems(base: Path) -> list[str]:
    """What is missing from a transformers model directory, each with the way to mend it; empty when it is whole."""
    if not base.is_dir():
        return [f"{base} is not a directory; give a transformers model directory or a hub id"]
    problems = []
    if not (base / "config.json").is_file():
        problems.append(f"{base / 'config.json'} is missing; save the model with `save_pretrained`")
    for name in ("config.json", "tokenizer_config.json"):
        problems += _unreadable(base / name)
    problems += _weight_problems(base) or base_weight_problems(base, _config_of(base))
    if not any((base / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        problems.append(f"{base} has no tokenizer; save it into the same directory with `tokenizer.save_pretrained`")
    elif not _has_chat_template(base):
        problems.append(
            f"{base} has no chat template (chat_template.jinja, or `chat_template` in tokenizer_config.json); dpo-loop talks to instruction-"
            "tuned models: set `tokenizer.chat_template` and save it again"
        )
    return problems


def _config_of(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    return _json_object(path) if path.is_file() and not _unreadable(path) else {}


def _weight_problems(base: Path) -> list[str]:
    index = base / "model.safetensors.index.json"
    if index.is_file():
        if broken := _unreadable(index):
            return broken
        weight_map = _json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            return [f"{index} has no weight_map, which says where the weights are; copy the whole model again"]
        shards = sorted({str(shard) for shard in weight_map.values()})
        return [
            f"{base / shard} is missing, though {index.name} lists it; copy the whole model"
            for shard in shards
            if not (base / shard).is_file()
        ]
    if any(base.glob("*.safetensors")):
        return []
    return [f"{base} has no *.safetensors weights; save the model with `save_pretrained`"]


def _has_chat_template(base: Path) -> bool:
    if (base / "chat_template.jinja").is_file() or (base / "chat_template.json").is_file():
        return True
    config = base / "tokenizer_config.json"
    if not config.is_file() or _unreadable(config):
        return config.is_file()  # a file that cannot be read is named for that
    return bool(_json_object(config).get("chat_template"))


def _unreadable(path: Path) -> list[str]:
    """The problem of a JSON file that holds no object; none where there is no file."""
    try:
        if path.is_file():
            _json_object(path)
    except ValueError as error:  # of decoding, too
        return [f"{path} is damaged: {error}; copy it again from where the model came from"]
    return []


def _json_object(path: Path) -> dict[str, Any]:
    """Raises ValueError for anything else."""
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def base_name(base: str) -> str:
    """How an adapter names its base wherever it is copied: the hub id of a snapshot, else the name of the directory."""
    for part in Path(base).parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return Path(base).name


def adapter_problems(adapter: Path, base: Path, *, base_sha256: str | None = None, max_rank: int | None = None) -> list[str]:
    """What keeps a PEFT adapter from being used on `base`; empty when nothing does.

    base_sha256: of the base where it is known already; else a directory is hashed, and a hub id cannot be compared.
    max_rank: of the engine that is to serve it; None where none is.
    """
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (adapter / name).is_file()]
    if missing:
        return [f"{adapter / name} is missing; save the adapter with `save_pretrained`" for name in missing]
    origin = adapter / ADAPTER_ORIGIN
    if broken := [*_unreadable(adapter / "adapter_config.json"), *_unreadable(origin)]:
        return broken
    config = _json_object(adapter / "adapter_config.json")
    problems = []
    if config.get("peft_type") != "LORA":
        return [f"{adapter} is a {config.get('peft_type')} adapter; only LORA adapters can be trained on and served"]
    problems += [*_feature_problems(adapter, config), *adapter_weight_problems(adapter / "adapter_model.safetensors", config)]
    made_for, here = config.get("base_model_name_or_path"), base_sha256
    if here is None and base.is_dir():
        here = fingerprint(base)["sha256"]
    recorded = _json_object(origin).get("base_sha256") if origin.is_file() else None
    if recorded is not None and here is not None and recorded != here:
        problems.append(f"{adapter} was trained on another base: weights {recorded[:12]}…, but {base} has {here[:12]}…")
    elif recorded is None and made_for and Path(base_name(made_for)).name != Path(base_name(str(base))).name:
        problems.append(
            f"{adapter} was trained on {made_for}, not on {base}; give the adapter of this base, or this adapter's base"
        )
    if max_rank is not None and config.get("r", 0) > max_rank:
        problems.append(
            f"{adapter} has rank {config['r']}, above the engine's max_lora_rank {max_rank}; raise generation.engine.max_lora_rank"
        )
    if max_rank is not None and config.get("use_dora"):
        problems.append(
            f"{adapter} is a DoRA adapter, which vLLM does not serve; merge it into its base (`merge_and_unload`, in float32) and give the "
            "merged model instead"
        )
    return problems


def _feature_problems(adapter: Path, config: dict[str, Any]) -> Iterator[str]:
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        yield (
            f"{adapter} was started by init_lora_weights = {init!r}, which changes the base when the adapter is loaded; convert it with PEFT's "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`"
        )
    for name, means in _NOT_CONTINUED.items():
        if config.get(name) not in (None, False, "none", [], {}):
            yield (
                f"{adapter} {means}: adapter_config.json has {name} = {config[name]!r}; only LoRA on linear layers can be continued and "
                "served. Merge it into its base and give that as the model"
            )


# -------------------------------------------------------------------------------------------------- on disk, relative


def write_policy(out: Path, policy: PolicyRef) -> None:
    """`policy.json` in a stage directory `<run>/rounds/NNN/<stage>`; paths below <run> are stored relative to it."""
    write_json(out / POLICY_FILE, _relative(policy, out.resolve().parents[2]))


def read_policy(stage_dir: Path) -> PolicyRef:
    """The policy that a stage made, with absolute paths. Raises CorruptArtifactError if there is none."""
    path = stage_dir / POLICY_FILE
    if not path.is_file():
        raise CorruptArtifactError(f"{path} is missing; remove {stage_dir} and run the same command again")
    return _absolute(PolicyRef.model_validate_json(path.read_bytes()), stage_dir.resolve().parents[2])


def write_blessing(path: Path, blessing: Blessing, *, run: Path) -> None:
    write_json(path, blessing.model_copy(update={"policy": _relative(blessing.policy, run.resolve())}))


def read_blessing(path: Path, *, run: Path) -> Blessing:
    blessing = read_json(path, Blessing)
    return blessing.model_copy(update={"policy": _absolute(blessing.policy, run.resolve())})


def _relative(policy: PolicyRef, root: Path) -> PolicyRef:
    paths = {name: getattr(policy, name) for name in _PATH_FIELDS}
    below = {name: Path(value).resolve() for name, value in paths.items() if value is not None and os.path.exists(value)}
    update = {name: str(path.relative_to(root)) for name, path in below.items() if path.is_relative_to(root)}
    return policy.model_copy(update=_published(update))


def _published(paths: dict[str, str]) -> dict[str, str]:
    """A stage writes its policy while its directory is still `.train.work`; what is stored is where it will be: `train`."""
    return {
        name: "/".join(part.removeprefix(".").removesuffix(".work") if part.endswith(".work") else part for part in path.split("/"))
        for name, path in paths.items()
    }


def _absolute(policy: PolicyRef, root: Path) -> PolicyRef:
    paths = {name: getattr(policy, name) for name in _PATH_FIELDS}
    return policy.model_copy(update={name: str(root / value) for name, value in paths.items() if value and (root / value).exists()})
