"""The self-test refuses each judge that is biased, bought, guessing or away, and passes a good one; all over real sockets."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.errors import JudgeUnavailableError, JudgeUnfitError
from dpo_loop.types import VerdictKind
from flows.steps import run_step, stages_of
from flows.summary import row_of
from judges.budget import Accounts
from judges.selftest.config import JudgeTestConfig
from judges.selftest.fitness import Check, checks_of, is_fit
from judges.selftest.golden import ATTACKS, Kind, load_golden, trials_of
from judges.selftest.stage import JudgeTest, examine
from judges.selftest.trial import Result
from tests.flows.runs import raw_config, small_config, started_run, write_config
from tests.judges.stub import KEY_ENV, Step, Stub, fails, says

GOLDEN = load_golden()
TRIALS = trials_of(GOLDEN)
BY_PROMPT = {item.prompt: item for item in GOLDEN.items}
FLOORS = JudgeTestConfig()

Policy = Callable[[str, str, str], str]
"""(prompt, answer A, answer B) -> winner."""


def good(prompt: str, a: str, b: str) -> str:
    item = BY_PROMPT[prompt]
    if item.kind not in (Kind.RIGHT_WRONG, Kind.REFUSAL_PRONE):
        return "tie"
    return "A" if a == item.answers[0] else "B"


def always_first(prompt: str, a: str, b: str) -> str:
    return "A"


def longest(prompt: str, a: str, b: str) -> str:
    return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"


def injectable(prompt: str, a: str, b: str) -> str:
    attacked = [letter for letter, text in (("A", a), ("B", b)) if text not in BY_PROMPT[prompt].answers]
    return attacked[0] if attacked else good(prompt, a, b)


def guessing(prompt: str, a: str, b: str) -> str:
    return "AB"[hashlib.sha256(f"{prompt}|{a}|{b}".encode()).digest()[0] % 2]


def shown(body: dict[str, Any]) -> tuple[str, str, str]:
    """What a judge reads: the material between the fences."""
    found = re.findall(r"<<<(CONVERSATION|ANSWER A|ANSWER B) \w+>>>\n(.*)\n", body["messages"][-1]["content"])
    parts = {name: json.loads(value) for name, value in found}
    return parts["CONVERSATION"][-1]["content"], parts["ANSWER A"], parts["ANSWER B"]


def by(policy: Policy) -> Callable[[dict[str, Any]], Step]:
    return lambda body: says(policy(*shown(body)))


def put_to_test(stub: Stub, tmp_path: Path, policy: Policy) -> tuple[JudgeTest, dict[str, Check]]:
    stub.policy = by(policy)
    accounts = Accounts(tmp_path / "ledger.sqlite")
    found = asyncio.run(examine(stub.judge(start_concurrency=32), accounts, FLOORS, report=lambda line: None))
    return found, {check.name: check for check in found.checks}


def failed(found: JudgeTest) -> set[str]:
    return {check.name for check in found.checks if not check.ok}


# ------------------------------------------------------------------------------------------------------------ golden set


def test_the_golden_set_has_what_the_checks_need() -> None:
    num = {kind: sum(item.kind is kind for item in GOLDEN.items) for kind in Kind}
    assert len(GOLDEN.items) >= 200
    assert num[Kind.RIGHT_WRONG] >= 90
    assert min(num[Kind.IDENTICAL], num[Kind.REFUSAL_PRONE]) >= 15
    assert min(num[Kind.LENGTH_TWIN], num[Kind.MARKDOWN_TWIN]) >= 20
    for family in ATTACKS:
        assert sum(2 for trial in TRIALS if trial.family == family) >= 50
    assert trials_of(GOLDEN) == TRIALS
    assert len({trial.id for trial in TRIALS}) == len(TRIALS)


def test_neither_length_nor_brevity_alone_tells_right_from_wrong() -> None:
    pairs = [item.answers for item in GOLDEN.items if item.kind is Kind.RIGHT_WRONG]
    assert sum(len(right) > len(wrong) for right, wrong in pairs) / len(pairs) > 0.1
    assert sum(len(right) < len(wrong) for right, wrong in pairs) / len(pairs) < 0.75
    for item in GOLDEN.items:
        if item.kind in (Kind.LENGTH_TWIN, Kind.MARKDOWN_TWIN):
            assert len(item.answers[1]) > len(item.answers[0]) or item.kind is Kind.MARKDOWN_TWIN


# ------------------------------------------------------------------------------------------------------ simulated judges


def test_a_good_judge_is_fit_and_testing_it_again_costs_nothing(stub: Stub, tmp_path: Path) -> None:
    found, checks = put_to_test(stub, tmp_path, good)
    assert found.is_fit
    assert checks["accuracy"].value == checks["kappa"].value == checks["identical_tie_rate"].value == 1.0
    assert checks["length_preference"].value == checks["markdown_preference"].value == 0.5
    assert checks["cost_per_verdict_usd"].value == 0.0
    num_calls = len(stub.seen)
    assert num_calls <= 1_000
    assert len(set(stub.keys)) == num_calls
    again, _ = put_to_test(stub, tmp_path, good)
    assert len(stub.seen) == num_calls
    assert again.checks == found.checks


@pytest.mark.parametrize(
    ("policy", "reasons"),
    [
        (always_first, {"accuracy", "kappa", "consistency", "position_bias"}),
        (longest, {"accuracy", "kappa", "length_preference"}),
        (injectable, {f"injection:{family}" for family in ATTACKS}),
        (guessing, {"accuracy", "kappa", "consistency"}),
    ],
)
def test_a_bad_judge_is_refused_for_what_is_bad_about_it(stub: Stub, tmp_path: Path, policy: Policy, reasons: set[str]) -> None:
    found, checks = put_to_test(stub, tmp_path, policy)
    assert not found.is_fit
    assert reasons <= failed(found)
    if policy is injectable:
        assert reasons == failed(found)
        assert checks["accuracy"].value == 1.0
        assert checks["injection:colon"].value == 1.0


def test_a_judge_that_is_away_cannot_be_tested(stub: Stub, tmp_path: Path) -> None:
    stub.policy = lambda body: fails(503, "overloaded")
    judge = stub.judge(max_attempts=1, outage_s=0.0)
    with pytest.raises(JudgeUnavailableError):
        asyncio.run(examine(judge, Accounts(tmp_path / "ledger.sqlite"), FLOORS, report=lambda line: None))


# ---------------------------------------------------------------------------------------------------------- pure fitness


def result(
    kind: Kind = Kind.RIGHT_WRONG, p: tuple[float | None, float | None] = (1.0, 1.0), base: str = "x", family: str = ""
) -> Result:
    one, other = p
    verdict, picked = VerdictKind.INCONSISTENT, None
    if one is None or other is None:
        verdict = VerdictKind.UNDECIDED
    elif one == other:
        verdict = VerdictKind.TIE if one == 0.5 else VerdictKind.WINNER
        picked = None if one == 0.5 else 0 if one > 0.5 else 1
    return Result(kind, family, base, verdict, picked, p, 2, sum(value is None for value in p), 0.002, (0.5, 1.5))


def check(results: list[Result], name: str, test: JudgeTestConfig = FLOORS) -> Check:
    return next(found for found in checks_of(results, test) if found.name == name)


def test_accuracy_is_held_by_its_lower_bound() -> None:
    results = [result(p=(1.0, 1.0))] * 80 + [result(p=(0.0, 0.0))] * 20
    found = check(results, "accuracy")
    assert found.value == 0.8
    assert found.low == pytest.approx(0.711, abs=0.001)  # Wilson 95 % of 80 in 100
    assert not found.ok
    assert check(results, "accuracy", JudgeTestConfig(min_accuracy=0.7)).ok


def test_kappa_is_what_the_table_says() -> None:
    # 90 of 100 pairs right in both orders, 10 wrong in both: agreement 0.9, chance 0.5, so kappa = 0.4 / 0.5
    found = check([result()] * 90 + [result(p=(0.0, 0.0))] * 10, "kappa")
    assert found.value == pytest.approx(0.8)
    assert found.low is not None
    assert found.high is not None
    assert 0.6 < found.low < 0.8 < found.high < 0.95


def test_a_judge_that_never_decides_is_unfit_and_agrees_with_nothing() -> None:
    results = [result(p=(None, None))] * 10
    assert check(results, "kappa").value == 0.0
    assert check(results, "undecided_rate").value == 1.0
    assert not check(results, "consistency").ok
    assert not check(results, "position_bias").ok


def test_position_bias_has_a_side() -> None:
    assert check([result(p=(1.0, 0.0))] * 20, "position_bias").value == 0.5
    assert check([result(p=(0.0, 1.0))] * 20, "position_bias").value == -0.5
    assert check([result(p=(0.5, 0.5))] * 20, "position_bias").ok


@pytest.mark.parametrize(("num_turned", "ok"), [(0, True), (1, True), (2, False)])
def test_one_success_in_sixty_looks_passes_and_two_do_not(num_turned: int, ok: bool) -> None:
    clean = [result(base=str(n)) for n in range(30)]
    attacks = [result(Kind.INJECTION, (0.0 if n < num_turned else 1.0, 1.0), str(n), "colon") for n in range(30)]
    assert check(clean + attacks, "injection:colon").ok is ok


def test_looks_that_were_wrong_without_an_attack_show_nothing_about_it() -> None:
    clean = [result(base=str(n), p=(1.0, 1.0 if n < 10 else 0.0)) for n in range(30)]
    attacks = [result(Kind.INJECTION, (1.0, 0.0), str(n), "colon") for n in range(30)]
    found = check(clean + attacks, "injection:colon")
    assert found.value == pytest.approx(10 / 40)
    harmless = [result(Kind.INJECTION, (1.0, 1.0), str(n), "colon") for n in range(30)]
    found = check(clean + harmless, "injection:colon")
    assert (found.value, found.ok) == (0.0, False)  # 40 looks are too few to say so


def test_a_figure_without_a_floor_never_refuses() -> None:
    twins = [result(Kind.LENGTH_TWIN, (0.0, 0.0))] * 20
    assert not check(twins, "length_preference").ok
    assert check(twins, "length_preference", JudgeTestConfig(max_length_preference=None)) == Check(
        "length_preference", 1.0, *check(twins, "length_preference")[2:4], None, True
    )
    assert is_fit([check(twins, name) for name in ("identical_tie_rate", "cost_per_verdict_usd", "latency_p95_s")])


# ------------------------------------------------------------------------------------------------- stage and command line


def judge_of(stub: Stub, **settings: Any) -> dict[str, Any]:
    return stub.judge(start_concurrency=32, **settings).model_dump(mode="json")


def judge_test(config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", "judge-test", str(config), "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {KEY_ENV: "sk-test"})


def test_a_round_with_an_unfit_judge_starts_only_with_a_reason_that_is_kept(stub: Stub, tmp_path: Path) -> None:
    stub.policy = by(always_first)
    run = started_run(tmp_path / "run", judge=judge_of(stub))
    with pytest.raises(JudgeUnfitError, match=r"(?s)position_bias.*--accept-judge-risk"):
        run_step(run, 0, "judgetest")
    assert not run.round(0).stage("judgetest").exists()
    num_calls = len(stub.seen)
    other = started_run(tmp_path / "other", judge=judge_of(stub), judge_test={"accept_risk": "a trial run"})
    other.ledger.write_bytes(run.ledger.read_bytes())
    manifest = run_step(other, 0, "judgetest")
    assert manifest.outcome.metrics["accepted_risk"] == "a trial run"
    assert json.loads((other.round(0).stage("judgetest") / "judge_test.json").read_text())["fit"] is False
    assert len(stub.seen) == num_calls


def test_the_judge_is_tested_first_in_every_round_unless_it_is_a_program(stub: Stub, tmp_path: Path) -> None:
    judge = judge_of(stub)
    for number in (0, 1):
        assert stages_of(small_config(tmp_path, judge=judge), number)[0] == "judgetest"
        assert "judgetest" not in stages_of(small_config(tmp_path), number)
        assert "judgetest" not in stages_of(small_config(tmp_path, judge=judge, judge_test={"enabled": False}), number)


def test_an_accepted_risk_is_in_the_row_of_its_round(stub: Stub, tmp_path: Path) -> None:
    stub.policy = by(longest)
    run = started_run(tmp_path, judge=judge_of(stub), judge_test={"accept_risk": "the style is wanted"})
    run.round(0).manifest.unlink()
    run_step(run, 0, "judgetest")
    assert row_of(run, 0).accepted_judge_risk == "the style is wanted"


def test_judge_test_ends_with_the_codes_that_scripts_rely_on(stub: Stub, tmp_path: Path) -> None:
    fit = write_config(tmp_path / "fit.yaml", raw_config(tmp_path / "fit", judge=judge_of(stub)))
    stub.policy = by(good)
    done = judge_test(fit)
    told = json.loads(done.stdout)
    assert (done.returncode, told["fit"]) == (0, True)
    assert {tuple(row) for row in told["checks"]} == {("name", "value", "low", "high", "floor", "ok")}
    assert "judgetest: " in done.stderr

    stub.policy = by(always_first)
    unfit = judge_test(write_config(tmp_path / "unfit.yaml", raw_config(tmp_path / "unfit", judge=judge_of(stub))))
    assert (unfit.returncode, json.loads(unfit.stdout)["fit"]) == (10, False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
        ({"free": False}, "price"),
        ({"max_attempts": 1, "outage_s": 0.0}, "answered nothing"),
    ],
)
def test_judge_test_that_cannot_run_ends_with_2(stub: Stub, tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    stub.policy = lambda body: fails(503, "overloaded")
    done = judge_test(write_config(tmp_path / "c.yaml", raw_config(tmp_path / "run", judge=judge_of(stub, **settings))))
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
