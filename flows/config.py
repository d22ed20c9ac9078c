"""RunConfig: one YAML file, the parameters of the flows, and what is recorded with a run, in one schema.

YAML → dict → `--set a.b=c` → RunConfig. All problems of a file are reported together, each opening with the dotted path of its key.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import Field, ValidationError

from dpo_loop.artifacts import fingerprint
from dpo_loop.config import (
    AnswerConfig,
    CapabilityConfig,
    GateConfig,
    GenerationConfig,
    PairingConfig,
    PromptsConfig,
    Settings,
    Start,
    TinyWorldConfig,
    TrainingConfig,
)
from dpo_loop.errors import ConfigError
from flows.paths import placeless_start, resolve_paths
from judges.accounts import BudgetConfig
from judges.config import GradingConfig, Judge, JudgingConfig
from judges.selftest.config import JudgeTestConfig


class RunConfig(Settings):
    """Everything about a run. A path that begins with `world:` is a file of the run's own tiny world."""

    not_in_key: ClassVar[frozenset[str]] = frozenset(
        {
            "run_dir",
            "rounds",
            "max_consecutive_failures",
            "stage_retries",
            "stage_timeout_s",
            "stage_python",
            "review_timeout_s",
            "start",
            "budget",
            "judge_test",
        }
    )
    run_id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=60)
    run_dir: str
    rounds: int = Field(3, ge=1)
    seed: int = 0
    world: TinyWorldConfig | None = None
    start: Start
    prompts: PromptsConfig
    generation: GenerationConfig
    judge: Judge
    judging: JudgingConfig = JudgingConfig()
    judge_test: JudgeTestConfig = JudgeTestConfig()
    budget: BudgetConfig = BudgetConfig()
    pairing: PairingConfig = PairingConfig()
    training: TrainingConfig
    answering: AnswerConfig = AnswerConfig()
    grading: GradingConfig
    capability: CapabilityConfig = CapabilityConfig()
    gate: GateConfig
    max_consecutive_failures: int = Field(2, ge=1)
    """Rounds in a row without promotion after which the loop stops."""
    stage_retries: int = Field(2, ge=0)
    """How often a stage that failed for a passing reason (outage, time-out, killed) is tried again."""
    stage_timeout_s: float | None = Field(None, gt=0)
    stage_python: dict[str, str] = Field(default_factory=dict)
    """Stage name → interpreter that runs it, where that is not the flow's own. That of `answer` also runs its like (layout.SAME_AS)."""
    review_timeout_s: float = Field(0.0, ge=0)
    """How long a round that needs a person is waited for before the loop goes on with the previous policy; 0 ends the command."""

    @property
    def label(self) -> str:
        """What a flow run is called in the Prefect UI."""
        return self.run_id


class ConfigFile(Settings):
    """A config by the path of its YAML file, read where the flow runs, at the time it runs."""

    file: str

    @property
    def label(self) -> str:
        return Path(self.file).stem


# ------------------------------------------------------------------------------------------------------------- reading


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The config in a YAML file with `a.b=c` overrides (values are YAML too), relative paths made absolute from here.

    Raises ConfigError with every problem: unknown key, wrong type, out of range, unreadable override.
    """
    raw = read_raw(path, overrides)
    try:
        return resolve_paths(RunConfig.model_validate(raw))
    except ValidationError as error:
        raise ConfigError(schema_problems(error, raw)) from None


def read_raw(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The file as a dict with the overrides applied. Raises ConfigError if either cannot be read."""
    try:
        raw = _read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"{path} does not exist; give the path of a YAML file, such as deploy/configs/demo.yaml"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path} is not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError([f"{path} holds {type(raw).__name__} instead of keys and values"])
    return apply_overrides(raw, overrides)


class _Loader(yaml.SafeLoader):
    """PyYAML reads `1e-5` as text (YAML 1.1 wants a dot); here it is a number, as in YAML 1.2. A key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a single word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def apply_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`raw` with each `a.b=c` set; a number in a path is an index of a list. Raises ConfigError listing those that do not fit."""
    changed = copy.deepcopy(dict(raw))
    problems = [problem for text in overrides if (problem := _override(changed, text))]
    if problems:
        raise ConfigError(problems)
    return changed


def _override(raw: dict[str, Any], text: str) -> str | None:
    name, equals, value_text = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        return f"--set {text}: write it as key=value, for example training.optimizer.lr=1e-5"
    try:
        value = _read_yaml(value_text)
    except yaml.YAMLError as error:
        return f"{name}: --set value {value_text!r} is not YAML: {' '.join(str(error).split())}"
    place: Any = raw
    for part in parts[:-1]:
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict):
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        else:
            return f"{name}: --set cannot reach it, {part!r} is inside a single value"
    if isinstance(place, list) and parts[-1].isdigit() and int(parts[-1]) < len(place):
        place[int(parts[-1])] = value
    elif isinstance(place, dict):
        place[parts[-1]] = value
    else:
        return f"{name}: --set cannot reach it, {parts[-1]!r} is inside a single value"
    return None


def schema_problems(error: ValidationError, raw: Mapping[str, Any]) -> list[str]:
    """One line per pydantic error, in the order of the file, with the path as the user wrote it."""
    lines = []
    items = error.errors()
    for item in items:
        if item["type"] == "too_short" and any(other["loc"][:-1][: len(item["loc"])] == item["loc"] for other in items):
            continue  # a list whose items are wrong counts as empty too
        path = ".".join(str(part) for part in written_path(item["loc"], raw))
        match item["type"]:
            case "extra_forbidden":
                text = "unknown key; remove it or mend its spelling"
            case "missing":
                text = "is missing"
            case _:
                text = re.sub(r"^Value error, ", "", item["msg"])
                text = text[:1].lower() + text[1:]
                if not isinstance(item["input"], dict | list):
                    text += f", not {item['input']!r}"
        lines.append(f"{path or 'the file'}: {text}")
    return lines


def written_path(loc: tuple[int | str, ...], raw: Any) -> list[int | str]:
    """A pydantic location without the tags of unions, which are not keys of the file: the tag comes first below a union."""
    path: list[int | str] = []
    below_union = False
    for part in loc:
        if not below_union and isinstance(raw, Mapping) and raw.get("kind") == part:
            below_union = True
            continue
        below_union = False
        path.append(part)
        if isinstance(raw, Mapping):
            raw = raw.get(part)
        elif isinstance(raw, list | tuple) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        else:
            raw = None
    return path


# ---------------------------------------------------------------------------------------------------------- comparison


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """`path: old → new` for every key that changes what a run makes; empty when both describe the same run."""
    pairs = [(fingerprint(config) | {"start": fingerprint(placeless_start(config.start))}) for config in (old, new)]
    return list(_differences("", *pairs))


def _differences(path: str, old: Any, new: Any) -> Iterable[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(f"{path}.{name}" if path else name, old.get(name), new.get(name))
    elif old != new:
        yield f"{path}: {old} → {new}"
