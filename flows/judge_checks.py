"""Whether the judges and graders of a config can be asked: keys, prices, rubrics, functions; and what is worth a warning."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dpo_loop.errors import InputError, JudgeUnfitError
from dpo_loop.evaluation.provenance import canary_problem
from dpo_loop.exchange import read_judge_canary
from dpo_loop.layout import RunDir
from flows.config import RunConfig
from flows.paths import is_hub_id
from flows.steps import import_from_here
from judges.config import (
    Judge,
    PanelJudge,
    RemoteJudge,
    RemoteModel,
    RewardModelJudge,
    Single,
    VerifierGrader,
    VerifierJudge,
    VllmRunBatchJudge,
    remotes_of,
    same_judge,
    sides_of,
)
from judges.rubric import load_rubric
from judges.selftest.config import judges_to_test


def _judges_of(config: RunConfig) -> Iterator[tuple[str, Single]]:
    """Every single judge with the path of its key."""
    judges: list[tuple[str, Judge | None]] = [("judge", config.judge), ("grading.win_judge", config.grading.win_judge)]
    for name, judge in judges:
        if isinstance(judge, PanelJudge):
            yield from ((f"{name}.judges.{index}", member) for index, member in enumerate(judge.judges))
        elif judge is not None:
            yield name, judge


def judge_problems(config: RunConfig) -> Iterator[str]:
    for name, judge in _judges_of(config):
        match judge:
            case RemoteJudge():
                yield from _remote_problems(config, name, judge)
            case VerifierJudge():
                yield from _function_problems(f"{name}.function", judge.function)
            case RewardModelJudge():
                if not is_hub_id(judge.model) and not Path(judge.model).is_dir():
                    yield f"{name}.model: {judge.model} is not a directory"
    if (problem := same_judge(config.judge, config.grading.safety)) is not None:
        yield problem
    for name, remote in remotes_of(config.grading.safety).items():
        yield from _remote_problems(config, name, remote)
    for name, grader in (("grading.task", config.grading.task), *sides_of(config.grading.safety).items()):
        if isinstance(grader, VerifierGrader):
            yield from _function_problems(f"{name}.function", grader.function)


def _remote_problems(config: RunConfig, name: str, judge: RemoteModel) -> Iterator[str]:
    if judge.api_key_env and not os.environ.get(judge.api_key_env):
        yield (
            f"{name}.api_key_env: the environment variable {judge.api_key_env} is not set; export it (any text for a server "
            "without keys)"
        )
    if isinstance(judge, VllmRunBatchJudge) and not is_hub_id(judge.weights) and not Path(judge.weights).is_dir():
        yield f"{name}.weights: {judge.weights} is not a directory"
    if isinstance(judge, RemoteJudge):
        try:
            load_rubric(judge.rubric)
        except InputError as error:
            yield f"{name}.rubric: {error}"
    if not judge.free:
        try:
            config.budget.price_list().of(judge.model)
        except InputError as error:
            yield f"{name}.model: {error}"


def refuse_unfit_grader(run: RunDir, config: RunConfig) -> None:
    """Round 0 has shown how the grader of safety does on answers whose grade is known. Raises JudgeUnfitError where every round would be INVALID by it."""
    canary = read_judge_canary(run.round(0).stage("grade"))
    if canary is not None and (problem := canary_problem(canary, None, config.gate)) is not None:
        raise JudgeUnfitError(
            f"{problem}. Every round would be INVALID, so none begins. In a new run, name another judge under grading.safety, or, where this is known "
            "and wanted, lower gate.min_judge_accuracy."
        )


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
