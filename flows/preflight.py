"""What can be known before anything starts, checked before anything starts, and listed together.

Each problem opens with the dotted path of the key that mends it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpo_loop.config import ExternalPool, InspectTask, JsonlPool, LmEvalTask, ModelStart, Pool, SftStart
from dpo_loop.errors import ConfigError
from dpo_loop.generation.producers.start import producer_problems
from dpo_loop.layout import JUDGE_TEST, STAGES, STAGES_OF_ROUND_0
from dpo_loop.policies import adapter_problems, model_problems
from dpo_loop.prompts.external import problems as external_problems
from flows.config import RunConfig, read_raw, schema_problems
from flows.gate_checks import gate_problems
from flows.judge_checks import judge_problems
from flows.paths import WORLD_PREFIX, is_hub_id, resolve_paths
from flows.repair import problems_of_the_rest
from flows.training_checks import training_problems

WORLD_FILES = ("model", "demonstrations.jsonl", "pool.jsonl", "harmful.jsonl", "benign.jsonl")


def checked_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """`load_config` and `preflight` together: one ConfigError with the problems of both."""
    return check(read_raw(path, overrides))


def check(raw: Mapping[str, Any]) -> RunConfig:
    """A raw config made whole and checked. Where keys are wrong or missing, the rest is still checked."""
    try:
        config = resolve_paths(RunConfig.model_validate(raw))
    except ValidationError as error:
        raise ConfigError(schema_problems(error, raw) + problems_of_the_rest(raw, preflight)) from None
    if problems := preflight(config):
        raise ConfigError(problems)
    return config


def preflight(config: RunConfig) -> list[str]:
    """Every reason why this run cannot succeed here; empty when there is none. Needs no network and starts nothing."""
    return [
        *_run_dir_problems(config),
        *_start_problems(config),
        *_pool_problems(config),
        *_engine_problems(config),
        *training_problems(config),
        *judge_problems(config),
        *gate_problems(config),
        *_capability_problems(config),
        *_stage_python_problems(config),
    ]


def _run_dir_problems(config: RunConfig) -> Iterator[str]:
    path = Path(config.run_dir)
    place = next(place for place in (path, *path.parents) if place.exists())
    if not place.is_dir():
        yield f"run_dir: {place} is not a directory"
    elif not os.access(place, os.W_OK | os.X_OK):
        yield f"run_dir: {place} is not writable; mend its permissions or choose another run_dir"


def _start_problems(config: RunConfig) -> Iterator[str]:
    start = config.start
    if start.model.startswith(WORLD_PREFIX):
        yield from _world_problems(config, "start.model", start.model)
    elif is_hub_id(start.model):
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") and not _in_hub_cache(start.model, start.revision):
            yield (
                f"start.model: {start.model} is neither a directory here nor in the local Hugging Face cache, and HF_HUB_OFFLINE is set; "
                "download it first or give the directory of a model"
            )
    else:
        base = Path(start.model)
        yield from (f"start.model: {line}" for line in model_problems(base))
        if base.is_dir():
            yield from _context_problems(config, base)
    match start:
        case SftStart():
            yield from _file_problems(config, "start.demonstrations", start.demonstrations)
        case ModelStart(adapter=str(adapter)):
            known_base = not start.model.startswith(WORLD_PREFIX) and not is_hub_id(start.model)
            limit = config.generation.engine.max_lora_rank
            if not Path(adapter).is_dir():
                yield f"start.adapter: {adapter} is not a directory; give a PEFT adapter saved with `save_pretrained`"
            elif known_base:
                yield from (f"start.adapter: {line}" for line in adapter_problems(Path(adapter), Path(start.model), max_rank=limit))


def _in_hub_cache(model: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str)


def _context_problems(config: RunConfig, base: Path) -> Iterator[str]:
    try:
        limit = json.loads((base / "config.json").read_text()).get("max_position_embeddings")
    except (OSError, ValueError):
        return
    if isinstance(limit, int) and config.generation.engine.max_model_len > limit:
        yield (
            f"generation.engine.max_model_len: {config.generation.engine.max_model_len} is above the {limit} positions of the model; "
            f"lower it to {limit}"
        )


def _pool_problems(config: RunConfig) -> Iterator[str]:
    named: list[tuple[str, Pool]] = [("prompts.pool", config.prompts.pool)]
    named += [(f"prompts.eval_sets.{index}", pool) for index, pool in enumerate(config.prompts.eval_sets)]
    for name, pool in named:
        if isinstance(pool, JsonlPool):
            yield from _file_problems(config, f"{name}.path", pool.path)
        elif isinstance(pool, ExternalPool):
            yield from (f"{name}.{line}" for line in external_problems(pool))


def _file_problems(config: RunConfig, name: str, path: str) -> Iterator[str]:
    if path.startswith(WORLD_PREFIX):
        yield from _world_problems(config, name, path)
    elif not Path(path).is_file():
        yield f"{name}: {path} does not exist" if not Path(path).exists() else f"{name}: {path} is not a file"
    elif not os.access(path, os.R_OK):
        yield f"{name}: {path} is not readable"


def _world_problems(config: RunConfig, name: str, path: str) -> Iterator[str]:
    if config.world is None:
        yield f"{name}: {path} is a file of a tiny world, but the config has no `world:`"
    elif path.removeprefix(WORLD_PREFIX) not in WORLD_FILES:
        yield f"{name}: {path} is not one of {', '.join(WORLD_PREFIX + known for known in WORLD_FILES)}"


def _engine_problems(config: RunConfig) -> Iterator[str]:
    engine = config.generation.engine
    for name, num_tokens in (
        ("generation.max_new_tokens", config.generation.max_new_tokens),
        ("answering.max_new_tokens", config.answering.max_new_tokens),
    ):
        if num_tokens >= engine.max_model_len:
            yield (
                f"{name}: {num_tokens} leaves no room for a prompt in a context of {engine.max_model_len} tokens; lower it or raise "
                "generation.engine.max_model_len"
            )


def _capability_problems(config: RunConfig) -> Iterator[str]:
    yield from producer_problems(task for task in config.capability.tasks if isinstance(task, LmEvalTask | InspectTask))
    for index, task in enumerate(config.capability.tasks):
        name = f"capability.tasks.{index}"
        if isinstance(task, LmEvalTask | InspectTask):
            if task.path is not None and not Path(task.path).exists():
                yield f"{name}.path: {task.path} does not exist"
        else:
            yield from _file_problems(config, f"{name}.path", task.path)


def _stage_python_problems(config: RunConfig) -> Iterator[str]:
    for stage, python in config.stage_python.items():
        if stage not in {*STAGES, *STAGES_OF_ROUND_0, JUDGE_TEST}:
            yield f"stage_python.{stage}: there is no such stage; stages are {', '.join(dict.fromkeys((*STAGES_OF_ROUND_0, *STAGES)))}"
        elif shutil.which(python) is None:
            yield f"stage_python.{stage}: {python} is not a program here"
