"""A gate that cannot decide on the prompts that there are is refused before the run, not after every round of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.errors import ConfigError
from flows.config import RunConfig
from flows.gate_checks import gate_problems, gate_warnings
from flows.preflight import check
from tests.flows.runs import raw_config, small_config
from tests.prompts.read_pools import known

CORE = {"kind": "builtin", "set": "core-v1"}
SMOKE = CORE | {"split": "smoke"}
HARM = {"id": "harm", "metric": "harmful_rate", "rule": "ceiling", "margin": 0.1}
REFUSALS = {"id": "refusals", "metric": "over_refusal_rate", "rule": "ceiling", "margin": 0.1}
WINS = {"id": "wins", "metric": "win_rate", "rule": "floor", "vs": "previous", "margin": 0.4}
PASSES = {"id": "passes", "metric": "pass_rate", "rule": "floor", "margin": 0.4}
VETO = {"id": "grave", "categories": ["S4", "S9"]}


def write_pool(path: Path, rows: Sequence[dict[str, Any]] = (), *, num_tasks: int = 40) -> dict[str, Any]:
    tasks = [{"prompt": f"ordinary question {number}"} for number in range(num_tasks)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*tasks, *rows]))
    return {"kind": "jsonl", "path": str(path)}


def tagged(num: int = 5, **tags: str) -> list[dict[str, Any]]:
    return [{"prompt": f"{tags} {number}", "tags": tags} for number in range(num)]


def config(
    folder: Path, eval_sets: list[dict[str, Any]], *checks: dict[str, Any], vetoes: Sequence[dict[str, Any]] = (), **prompts: Any
) -> RunConfig:
    pool = write_pool(folder / "pool.jsonl") if "pool" not in prompts else prompts.pop("pool")
    asked = {"pool": pool, "eval_sets": eval_sets, **prompts}
    return small_config(folder / "run", prompts=asked, gate={"checks": list(checks or [HARM, REFUSALS]), "vetoes": list(vetoes)})


def keys(made: RunConfig) -> list[str]:
    return [line.partition(": ")[0] for line in gate_problems(made)]


def test_checks_of_harm_need_harmful_prompts(tmp_path: Path) -> None:
    assert keys(config(tmp_path, [])) == ["gate.checks.0.metric", "gate.checks.1.metric"]
    assert keys(config(tmp_path, [CORE])) == []
    harmful = write_pool(tmp_path / "harmful.jsonl", tagged(side="harmful"), num_tasks=0)
    assert keys(config(tmp_path, [harmful])) == ["gate.checks.1.metric"]
    tagged_pool = write_pool(tmp_path / "tagged.jsonl", [*tagged(200, side="harmful"), *tagged(200, side="benign")])
    assert keys(config(tmp_path, [], pool=tagged_pool)) == []
    assert keys(config(tmp_path, [], pool=tagged_pool, eval_fraction=0.0)) == ["gate.checks.0.metric", "gate.checks.1.metric"]
    assert keys(config(tmp_path, [CORE], eval_reserve=1.0)) == ["gate.checks.0.metric", "gate.checks.1.metric"]


def test_the_sentence_says_what_is_missing_and_it_stops_the_run(tmp_path: Path) -> None:
    raw = raw_config(tmp_path / "run", prompts={"pool": write_pool(tmp_path / "pool.jsonl")}, gate={"checks": [HARM]})
    with pytest.raises(ConfigError) as caught:
        check(raw)
    [told] = caught.value.problems
    assert told == (
        "gate.checks.0.metric: harmful_rate of check harm needs harmful prompts, and prompts.pool and prompts.eval_sets have none that is "
        "evaluated: every round would be INVALID. Name a set that has some under prompts.eval_sets, or remove it"
    )


def test_win_and_pass_rates_need_tasks(tmp_path: Path) -> None:
    assert keys(config(tmp_path, [CORE], WINS, PASSES)) == []
    assert keys(config(tmp_path, [CORE], WINS, PASSES, eval_fraction=0.0)) == ["gate.checks.0.metric", "gate.checks.1.metric"]


def test_a_veto_of_categories_that_no_set_has_is_told_with_those_there_are(tmp_path: Path) -> None:
    assert keys(config(tmp_path, [CORE], vetoes=[VETO])) == []
    [told] = gate_problems(config(tmp_path, [CORE], vetoes=[VETO, VETO | {"id": "typo", "categories": ["S04", "s9"]}]))
    assert told.startswith(
        "gate.vetoes.1.categories: veto typo watches harmful prompts of category S04, s9, and those of prompts.pool"
    )
    assert "are of S1, S10, S11" in told
    own = write_pool(tmp_path / "own.jsonl", [*tagged(side="harmful"), *tagged(side="benign", category="S4")], num_tasks=0)
    # Of its category, but on the side that it does not watch.
    assert keys(config(tmp_path, [own], vetoes=[VETO, VETO | {"id": "any", "categories": ["*"]}])) == ["gate.vetoes.0.categories"]
    assert keys(config(tmp_path, [own], vetoes=[VETO | {"metric": "over_refusal_rate"}])) == []


@pytest.mark.parametrize(
    ("eval_set", "found"),
    [
        ({"kind": "datasets", "path": "org/set"}, []),
        ({"kind": "jsonl", "path": "world:harmful.jsonl"}, []),
        ({"kind": "jsonl", "path": "/nowhere/at/all.jsonl"}, []),
        (known("xstest"), []),
        (known("strongreject"), ["gate.checks.1.metric"]),
        (known("advbench"), ["gate.checks.1.metric", "gate.vetoes.0.categories"]),
    ],
    ids=["hub", "world", "not there", "both sides", "one side", "no categories"],
)
def test_a_set_that_is_not_here_may_have_what_it_can_have(tmp_path: Path, eval_set: dict[str, Any], found: list[str]) -> None:
    assert keys(config(tmp_path, [eval_set], HARM, REFUSALS, vetoes=[VETO])) == found


def test_bad_lines_are_passed_over_here_and_told_where_they_are_read(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "bad.jsonl", [*tagged(side="harmful"), *tagged(side="benign")], num_tasks=0)
    path = Path(pool["path"])
    path.write_bytes(b"{broken\n\xff\n" + path.read_bytes())
    assert keys(config(tmp_path, [pool])) == []


def test_the_smoke_split_alone_is_a_warning(tmp_path: Path) -> None:
    [told] = gate_warnings(config(tmp_path, [SMOKE]))
    assert told.startswith("prompts.eval_sets: harmful and benign prompts are the smoke split alone")
    harmful = write_pool(tmp_path / "harmful.jsonl", tagged(side="harmful"), num_tasks=0)
    for sets in ([], [CORE], [SMOKE, CORE], [SMOKE, harmful], [SMOKE, known("xstest")]):
        assert gate_warnings(config(tmp_path, sets)) == []
    assert keys(config(tmp_path, [SMOKE])) == []
