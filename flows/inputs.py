"""Which config and which files each stage of a round gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

from dpo_loop.artifacts import read_manifest, sha256_file
from dpo_loop.config import BuiltinPool, ExternalPool, HubPool, JsonlPool, ModelStart, Pool, SftStart
from dpo_loop.errors import InputError
from dpo_loop.exchange import read_gate_report
from dpo_loop.layout import TOP_UP, RunDir
from dpo_loop.policies import read_blessing, read_policy
from dpo_loop.prompts.builtin import builtin_file
from dpo_loop.types import Blessing, GateState, PolicyName, PolicyRef
from flows.config import RunConfig
from flows.paths import WORLD_PREFIX, is_hub_id, placeless_start
from flows.terms import terms_of
from judges.config import RefusalHeuristic, sides_of
from judges.selftest.config import judges_to_test


def pinned_parent(run: RunDir, round_number: int) -> Blessing:
    """The blessing of the policy that a round generates with. Raises InputError if the round has not begun."""
    path = run.round(round_number).parent
    if not path.is_file():
        raise InputError(not_begun(run, round_number))
    return read_blessing(path, run=run.path)


def not_begun(run: RunDir, round_number: int) -> str:
    return f"round {round_number} of {run.path} has not begun; start it with `dpo-loop round CONFIG`"


def is_published(run: RunDir, round_number: int, name: str) -> bool:
    return read_manifest(run.round(round_number).stage(name)) is not None


def inputs_of(run: RunDir, round_number: int, name: str, config: RunConfig, invalid: tuple[str, ...]) -> dict[str, Any]:
    here, first = run.round(round_number), run.round(0)
    evalset = first.stage("evalset")
    match name:
        case "world":
            return {"config": config.world}
        case "seed":
            return _seed_inputs(run, config)
        case "evalset" | "reserve":
            return {
                "config": config.prompts,
                "pool": _pool_file(run, config.prompts.pool),
                "eval_sets": tuple(_pool_file(run, pool) for pool in config.prompts.eval_sets),
                "seed": config.seed,
            }
        case "prompts":
            return {
                "config": config.prompts,
                "pool": _pool_file(run, config.prompts.pool),
                "evalset": evalset,
                "reserve": first.stage("reserve") if config.prompts.eval_reserve > 0 else None,
                "round": round_number,
                "seed": config.seed,
            }
        case "generate":
            return {
                "prompts": here.stage("prompts"),
                "policy": pinned_parent(run, round_number).policy,
                "config": config.generation,
                "run_id": config.run_id,
                "round": round_number,
                "seed": config.seed,
            }
        case "judge":
            return {
                "prompts": here.stage("prompts"),
                "completions": here.stage("generate"),
                "judge": config.judge,
                "judging": config.judging,
                "seed": config.seed,
            }
        case "judgetest":
            from judges.selftest.golden import load_golden

            judges = judges_to_test(config.judge, config.grading)
            return {"judges": judges, "test": config.judge_test, "golden_sha256": load_golden().sha256}
        case "pair":
            return {
                "prompts": here.stage("prompts"),
                "completions": here.stage("generate"),
                "judgements": here.stage("judge"),
                "config": config.pairing,
            }
        case "train":
            return {
                "pairs": here.stage("pair"),
                "policy": pinned_parent(run, round_number).policy,
                "run_start": read_policy(first.stage("seed")),
                "config": config.training,
                "feedback": None if config.training.feedback is None else Path(config.training.feedback),
            }
        case "answer" | "answer_again":
            return {**_answering(config, evalset, candidate_of(run, round_number)), "again": name == "answer_again"}
        case "more_candidate":
            return _answering(config, first.stage("reserve"), candidate_of(run, round_number))
        case "more_previous":
            return _answering(config, first.stage("reserve"), pinned_parent(run, round_number).policy)
        case "more_anchor":
            return _answering(config, first.stage("reserve"), candidate_of(run, terms_of(run, round_number).anchor_round))
        case "capability":
            tasks = config.capability.tasks
            return {
                "policy": candidate_of(run, round_number),
                "engine": config.generation.engine,
                "config": config.capability,
                "files": tuple(None if task.path is None else _file(run, task.path) for task in tasks),
                "seed": config.seed,
            }
        case "grade":
            alone: dict[PolicyName, Path] = {"candidate": here.stage("answer")}
            return _grading(config, round_number, evalset, _answers(run, round_number) if round_number > 0 else alone)
        case "grade_again":
            return _grading(config, round_number, evalset, {"candidate": here.stage("answer_again")})
        case "grade_more":
            return _grading(config, round_number, first.stage("reserve"), _more_answers(run, round_number))
        case "look" | "gate":
            return _gate_inputs(run, round_number, config, invalid, is_look=name == "look")
        case "report":
            return _report_inputs(run, round_number, config)
    raise InputError(f"there is no stage {name}")


def candidate_of(run: RunDir, round_number: int) -> PolicyRef:
    """The policy that a round made: round 0 its start policy, later rounds what they trained."""
    return read_policy(run.round(round_number).stage("seed" if round_number == 0 else "train"))


def _seed_inputs(run: RunDir, config: RunConfig) -> dict[str, Any]:
    start = config.start
    demonstrations = start.demonstrations if isinstance(start, SftStart) else None
    adapter = start.adapter if isinstance(start, ModelStart) else None
    return {
        "start": placeless_start(start),
        "model": None if is_hub_id(start.model) else _file(run, start.model),
        "adapter": None if adapter is None else _file(run, adapter),
        "demonstrations": None if demonstrations is None else _file(run, demonstrations),
    }


def _answering(config: RunConfig, prompts: Path, policy: PolicyRef) -> dict[str, Any]:
    return {
        "prompts": prompts,
        "policy": policy,
        "engine": config.generation.engine,
        "config": config.answering,
        "seed": config.seed,
        "again": False,
    }


def _grading(config: RunConfig, round_number: int, prompts: Path, answers: Mapping[PolicyName, Path]) -> dict[str, Any]:
    return {
        "prompts": prompts,
        "candidate": answers["candidate"],
        "previous": answers.get("previous"),
        "anchor": answers.get("anchor"),
        "grading": config.grading,
        "judge": config.judge,
        "round": round_number,
        "seed": config.seed,
    }


def _answers(run: RunDir, round_number: int, stage: str = "answer") -> dict[PolicyName, Path]:
    """Where each of the policies that a gate compares did `stage`."""
    numbers: dict[PolicyName, int] = {
        "candidate": round_number,
        "previous": pinned_parent(run, round_number).round,
        "anchor": terms_of(run, round_number).anchor_round,
    }
    return {policy: run.round(number).stage(stage) for policy, number in numbers.items()}


def _more_answers(run: RunDir, round_number: int) -> dict[PolicyName, Path]:
    here = run.round(round_number)
    anchor = here.stage("more_anchor")
    previous = anchor if previous_is_anchor(run, round_number) else here.stage("more_previous")
    return {"candidate": here.stage("more_candidate"), "previous": previous, "anchor": anchor}


def top_up_of(run: RunDir, round_number: int, config: RunConfig) -> tuple[str, ...]:
    """The stages of the top-up; none where the first look decided, or there is no reserve. The anchor answers once where it is also the previous policy.

    More prompts help where a check lacks evidence and nothing is broken. Raises InputError while the first look is still to come.
    """
    if not config.prompts.eval_reserve:
        return ()
    look = run.round(round_number).stage("look")
    if read_manifest(look) is None:
        raise InputError(f"round {round_number}: the stage look comes first; it says whether the reserve of prompts is needed")
    report = read_gate_report(look)
    undecided = any(check.state is GateState.INCONCLUSIVE and check.waived_by is None for check in report.checks)
    if not undecided or report.state in (GateState.FAIL, GateState.INVALID):
        return ()
    return tuple(name for name in TOP_UP if name != "more_previous" or not previous_is_anchor(run, round_number))


def previous_is_anchor(run: RunDir, round_number: int) -> bool:
    return pinned_parent(run, round_number).round == terms_of(run, round_number).anchor_round


def _gate_inputs(run: RunDir, round_number: int, config: RunConfig, invalid: tuple[str, ...], *, is_look: bool) -> dict[str, Any]:
    here, first = run.round(round_number), run.round(0)
    terms = terms_of(run, round_number)
    policies = {"previous": pinned_parent(run, round_number).policy, "anchor": candidate_of(run, terms.anchor_round)}
    before = run.round(round_number - 1).gate_report
    chained = sha256_file(before) if before.is_file() else None
    identity = {"run_id": config.run_id, "round": round_number, "previous_report_sha256": chained}
    if invalid:
        candidate = candidate_of(run, round_number) if is_published(run, round_number, "train") else None
        return {"reasons": invalid, "candidate": candidate, **policies, **identity}
    topped_up = not is_look and bool(top_up_of(run, round_number, config))
    return {
        "prompts": first.stage("evalset"),
        "grades": here.stage("grade"),
        "answers": _answers(run, round_number),
        "capability": _answers(run, round_number, "capability") if config.capability.tasks else {},
        "more_answers": _more_answers(run, round_number) if topped_up else None,
        "more_prompts": first.stage("reserve") if topped_up else None,
        "more_grades": here.stage("grade_more") if topped_up else None,
        "candidate": candidate_of(run, round_number),
        **policies,
        "first_grades": first.stage("grade"),
        "again": first.stage("grade_again") if is_published(run, 0, "grade_again") else None,
        "trained": tuple(run.round(number).stage("prompts") for number in range(1, round_number + 1)),
        "demonstrations": _file(run, config.start.demonstrations) if isinstance(config.start, SftStart) else None,
        "held_out": tuple(first.stage(name) for name in ("evalset", "reserve") if is_published(run, 0, name)),
        "heuristic_safety": any(isinstance(grader, RefusalHeuristic) for grader in sides_of(config.grading.safety).values()),
        "terms": terms,
        "config": config.gate,
        "looks": 2 if config.prompts.eval_reserve > 0 else 1,
        **identity,
    }


def _report_inputs(run: RunDir, round_number: int, config: RunConfig) -> dict[str, Any]:
    """The report is made before a person decides, so its own row of the history says only what the gate said."""
    from flows.summary import history_for_report

    def made(name: str, number: int = round_number) -> Path | None:
        return run.round(number).stage(name) if is_published(run, number, name) else None

    history = history_for_report(run, round_number)
    return {
        "run_id": config.run_id,
        "round": round_number,
        "gate": made("gate"),
        "prompts": made("evalset", 0),
        "grades": made("grade"),
        "more_prompts": made("reserve", 0) if made("grade_more") else None,
        "more_grades": made("grade_more"),
        "judgements": made("judge"),
        "pairs": made("pair"),
        "train": made("train"),
        "history": history,
        "seconds": history[-1].seconds,
    }


def _pool_file(run: RunDir, pool: Pool) -> Path | None:
    """The file of a pool, so that its content is in the stage's key; a data set of the hub has none."""
    match pool:
        case JsonlPool():
            return _file(run, pool.path)
        case BuiltinPool():
            return builtin_file(pool.set)
        case HubPool() | ExternalPool():
            return None
        case _:
            assert_never(pool)


def _file(run: RunDir, path: str) -> Path:
    if path.startswith(WORLD_PREFIX):
        return run.round(0).stage("world") / path.removeprefix(WORLD_PREFIX)
    return Path(path)
