"""A config of which some keys are wrong, made readable, so that what is wrong elsewhere is told in the same message."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from flows.config import RunConfig, written_path
from flows.paths import resolve_paths

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


def problems_of_the_rest(raw: Mapping[str, Any], preflight: Callable[[RunConfig], list[str]]) -> list[str]:
    """What preflight finds in the keys that can be read: wrong ones are left out, or stood in for where they are required."""
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
