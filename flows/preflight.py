"""What can be known before anything starts, checked before anything starts, and listed together.

Each problem opens with the dotted path of the key that mends it.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpo_loop.config import JsonlPool, ModelStart, Pool, SftStart
from dpo_loop.errors import ConfigError, InputError
from dpo_loop.layout import JUDGE_TEST, STAGES, STAGES_OF_ROUND_0
from dpo_loop.policies import adapter_problems, model_problems
from flows.config import WORLD_PREFIX, RunConfig, is_hub_id, read_raw, resolve_paths, schema_problems, written_path
from flows.steps import import_from_here
from judges.config import Judge, PanelJudge, RemoteJudge, RewardModelJudge, Single, VerifierGrader, VerifierJudge, VllmRunBatchJudge
from judges.rubric import load_rubric
from judges.selftest.config import judges_to_test

WORLD_FILES = ("model", "demonstrations.jsonl", "pool.jsonl", "harmful.jsonl", "benign.jsonl")


def checked_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """`load_config` and `preflight` together: one ConfigError with the problems of both."""
    return check(read_raw(path, overrides))


def check(raw: Mapping[str, Any]) -> RunConfig:
    """A raw config made whole and checked. Where keys are wrong or missing, the rest is still checked."""
    try:
        config = resolve_paths(RunConfig.model_validate(raw))
    except ValidationError as error:
        raise ConfigError(schema_problems(error, raw) + _problems_of_the_rest(raw)) from None
    if problems := preflight(config):
        raise ConfigError(problems)
    return config


# What takes the place of a required key that is wrong or missing; `*` is any item of a list. No problem that names such a key is told.
_STAND_INS: dict[str, Any] = {
    "run_id": "x",
    "run_dir": "runs/x",
    "start": {"kind": "model", "model": "x/x"},
    "start.model": "x/x",
    "prompts": {"pool": {"kind": "datasets", "path": "x"}},
    "prompts.pool": {"kind": "datasets", "path": "x"},
    "prompts.eval_sets.*": {"kind": "datasets", "path": "x"},
    "generation": {"engine": {"kind": "vllm_offline"}},
    "generation.engine": {"kind": "vllm_offline"},
    "judge": {"kind": "verifier", "function": "builtins:len"},
    "training": {"loss": {"kind": "sigmoid"}},
    "training.loss": {"kind": "sigmoid"},
    "grading": {"safety": {"kind": "heuristic"}},
    "grading.safety": {"kind": "heuristic"},
    "gate": {"checks": [{"id": "x", "metric": "harmful_rate", "rule": "ceiling", "margin": 1}]},
    "gate.checks": [{"id": "x", "metric": "harmful_rate", "rule": "ceiling", "margin": 1}],
    "gate.checks.*": {"metric": "harmful_rate", "rule": "ceiling", "margin": 1},
}
_MAX_REPAIRS = 20
"""Rounds of repair; each leaves out or replaces what the one before found wrong."""


def _problems_of_the_rest(raw: Mapping[str, Any]) -> list[str]:
    """Preflight problems of the keys that can be read: wrong ones are left out, or stood in for where they are required."""
    rest = json.loads(json.dumps(raw, default=str))
    repaired: set[str] = set()
    for _ in range(_MAX_REPAIRS):
        try:
            config = RunConfig.model_validate(rest)
        except ValidationError as error:
            for item in error.errors():
                path = [str(part) for part in written_path(item["loc"], rest)]
                repaired.add(_repair(rest, path, is_missing=item["type"] == "missing"))
            continue
        # A problem names every key that it comes from: its own, and the one that would mend it too.
        told = re.compile("|".join(rf"(?<![\w./-]){re.escape(path)}(?![\w/-])" for path in repaired))
        return [line for line in preflight(resolve_paths(config)) if not told.search(line)]
    return []


def _repair(raw: Any, path: list[str], *, is_missing: bool) -> str:
    """Leave out what is wrong; put a stand-in where something is missing, or in place of the part that lacks it. Returns the path repaired."""
    while path:
        *above, last = path
        place = _at(raw, above)
        generic = ".".join("*" if part.isdigit() else part for part in path)
        if isinstance(place, dict):
            if not is_missing:
                place.pop(last, None)
                break
            if generic in _STAND_INS:
                place[last] = copy.deepcopy(_STAND_INS[generic])
                break
        elif isinstance(place, list) and generic in _STAND_INS and int(last) < len(place):
            stand_in = _STAND_INS[generic]
            place[int(last)] = {**stand_in, "id": ".".join(path)} if generic == "gate.checks.*" else dict(stand_in)
            break
        path = above
    return ".".join(path)


def _at(raw: Any, path: list[str]) -> Any:
    for part in path:
        if isinstance(raw, dict):
            raw = raw.get(part)
        elif isinstance(raw, list) and part.isdigit() and int(part) < len(raw):
            raw = raw[int(part)]
        else:
            return None
    return raw


def preflight(config: RunConfig) -> list[str]:
    """Every reason why this run cannot succeed here; empty when there is none. Needs no network and starts nothing."""
    return [
        *_run_dir_problems(config),
        *_start_problems(config),
        *_pool_problems(config),
        *_engine_problems(config),
        *_judge_problems(config),
        *_gate_problems(config),
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
            if start.sft.lora is not None:
                yield from _rank_problems(config, "start.sft.lora.rank", start.sft.lora.rank)
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
    yield from _rank_problems(config, "training.lora.rank", config.training.lora.rank)
    for name, num_tokens in (
        ("generation.max_new_tokens", config.generation.max_new_tokens),
        ("answering.max_new_tokens", config.answering.max_new_tokens),
    ):
        if num_tokens >= engine.max_model_len:
            yield (
                f"{name}: {num_tokens} leaves no room for a prompt in a context of {engine.max_model_len} tokens; lower it or raise "
                "generation.engine.max_model_len"
            )


def _rank_problems(config: RunConfig, name: str, rank: int) -> Iterator[str]:
    limit = config.generation.engine.max_lora_rank
    if rank > limit:
        yield f"{name}: {rank} is above the engine's limit {limit}; raise generation.engine.max_lora_rank or lower the rank"


def _judges_of(config: RunConfig) -> Iterator[tuple[str, Single]]:
    """Every single judge with the path of its key."""
    judges: list[tuple[str, Judge | None]] = [("judge", config.judge), ("grading.win_judge", config.grading.win_judge)]
    for name, judge in judges:
        if isinstance(judge, PanelJudge):
            yield from ((f"{name}.judges.{index}", member) for index, member in enumerate(judge.judges))
        elif judge is not None:
            yield name, judge


def _judge_problems(config: RunConfig) -> Iterator[str]:
    for name, judge in _judges_of(config):
        match judge:
            case RemoteJudge():
                yield from _remote_problems(config, name, judge)
                if isinstance(judge, VllmRunBatchJudge) and not is_hub_id(judge.weights) and not Path(judge.weights).is_dir():
                    yield f"{name}.weights: {judge.weights} is not a directory"
            case VerifierJudge():
                yield from _function_problems(f"{name}.function", judge.function)
            case RewardModelJudge():
                if not is_hub_id(judge.model) and not Path(judge.model).is_dir():
                    yield f"{name}.model: {judge.model} is not a directory"
    for name, grader in (("grading.task", config.grading.task), ("grading.safety", config.grading.safety)):
        if isinstance(grader, VerifierGrader):
            yield from _function_problems(f"{name}.function", grader.function)


def _remote_problems(config: RunConfig, name: str, judge: RemoteJudge) -> Iterator[str]:
    if judge.api_key_env and not os.environ.get(judge.api_key_env):
        yield (
            f"{name}.api_key_env: the environment variable {judge.api_key_env} is not set; export it (any text for a server "
            "without keys)"
        )
    try:
        load_rubric(judge.rubric)
    except InputError as error:
        yield f"{name}.rubric: {error}"
    if not judge.free:
        try:
            config.budget.price_list().of(judge.model)
        except InputError as error:
            yield f"{name}.model: {error}"


def warnings(config: RunConfig) -> list[str]:
    """What does not stop a run and should be known before it: a judge that nothing tests, and one of the policy's own family, which
    favours it (arXiv 2404.13076)."""
    found = []
    policy = _family_word(config)
    for name, judge in _judges_of(config):
        if isinstance(judge, RemoteJudge | RewardModelJudge) and policy and policy in f"{judge.family} {judge.model}".lower():
            found.append(
                f"{name}: {judge.model} is of the policy's own family ({policy}); judges favour their own. Use a judge of another "
                "family, or a panel of several."
            )
    if not config.judge_test.enabled and (untested := judges_to_test(config.judge, config.grading)):
        found.append(
            f"judge_test.enabled: nothing tests {' and '.join(untested)} before a round, so one that is biased, guesses or can be talked "
            "into a verdict makes labels unnoticed. Set it to true, or look with `dpo-loop judge-test CONFIG`."
        )
    return found


def _family_word(config: RunConfig) -> str:
    """What models of the policy's family are called: its model type without the version, `qwen3_moe` → `qwen`."""
    start = config.start.model
    try:
        told = str(json.loads((Path(start) / "config.json").read_text()).get("model_type", ""))
    except (OSError, ValueError):
        told = start.rpartition("/")[2] if is_hub_id(start) else ""
    found = re.match(r"[a-z]{3,}", told.lower())
    return found[0] if found else ""


def _function_problems(name: str, function: str) -> Iterator[str]:
    module, _, attribute = function.partition(":")
    import_from_here()
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # a user's module may raise anything on import
        yield f"{name}: cannot import {module}: {type(error).__name__}: {error}"
        return
    if not callable(found):
        yield f"{name}: {module} has no function {attribute}"


def _gate_problems(config: RunConfig) -> Iterator[str]:
    for index, rule in enumerate(config.gate.checks):
        if rule.metric == "pass_rate" and config.grading.task is None:
            yield f"gate.checks.{index}.metric: pass_rate needs a task grader; set grading.task or remove the check"


def _stage_python_problems(config: RunConfig) -> Iterator[str]:
    for stage, python in config.stage_python.items():
        if stage not in {*STAGES, *STAGES_OF_ROUND_0, JUDGE_TEST}:
            yield f"stage_python.{stage}: there is no such stage; stages are {', '.join(dict.fromkeys((*STAGES_OF_ROUND_0, *STAGES)))}"
        elif shutil.which(python) is None:
            yield f"stage_python.{stage}: {python} is not a program here"
