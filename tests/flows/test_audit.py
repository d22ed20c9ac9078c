"""From a pair to every raw reply that made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dpo_loop.artifacts import materialize
from dpo_loop.errors import InputError
from dpo_loop.exchange import PROMPTS, completions_file, read_pairs
from dpo_loop.layout import RunDir
from dpo_loop.pairing.stage import PAIR
from flows.audit import audit
from flows.cli import main
from flows.rounds import begin_round
from flows.steps import read_run_config
from judges.accounts import Accounts
from judges.stage import judge_stage
from tests.flows.runs import publish, started_run
from tests.judges.stub import KEY_ENV, Stub, says
from tests.judges.world import make_completion, make_prompt


def _is_first(answer: str, body: dict[str, Any]) -> bool:
    lines = body["messages"][1]["content"].splitlines()
    return bool(lines[lines.index(answer) - 1].startswith("<<<ANSWER A"))


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A round of two prompts judged by a server: of one a pair is made, of the other none."""
    monkeypatch.setenv(KEY_ENV, "sk-test-0123456789")
    run = started_run(tmp_path / "run")
    begin_round(run, 1)
    here = run.round(1)
    prompts = [make_prompt("Say hello"), make_prompt("Say bye")]
    texts = [["hello", "go away"], ["same", "same"]]
    rows = [make_completion(p, k, text) for p, answers in zip(prompts, texts, strict=True) for k, text in enumerate(answers)]
    publish(here.stage("prompts"), {PROMPTS: "".join(f"{prompt.model_dump_json()}\n" for prompt in prompts)})
    publish(here.stage("generate"), {completions_file(0): "".join(f"{row.model_dump_json()}\n" for row in rows)})
    with Stub() as stub:
        stub.policy = lambda body: says("A" if _is_first('"hello"', body) else "B", rationale="kinder")
        materialize(
            judge_stage(Accounts(run.ledger)),
            here.stage("judge"),
            prompts=here.stage("prompts"),
            completions=here.stage("generate"),
            judge=stub.judge(),
            seed=0,
        )
    inputs = {"prompts": here.stage("prompts"), "completions": here.stage("generate"), "judgements": here.stage("judge")}
    materialize(PAIR, here.stage("pair"), **inputs, config=read_run_config(run).pairing)
    return run


def test_a_pair_leads_to_every_reply_that_made_it(judged: RunDir) -> None:
    [pair] = read_pairs(judged.round(1).stage("pair"))
    for name in (pair.prompt_id, pair.chosen_id, pair.rejected_id[:10]):
        found = audit(judged, name)
        assert found["pair"] == {"chosen_id": pair.chosen_id, "rejected_id": pair.rejected_id, "margin": 1.0}
        label = [ballot for ballot in found["ballots"] if ballot["makes_the_label"]]
        assert {ballot["key"] for ballot in label} == set(pair.ballot_keys)
        assert {(b["left_id"], b["right_id"]) for b in label} == {
            (pair.chosen_id, pair.rejected_id),
            (pair.rejected_id, pair.chosen_id),
        }
        assert all(json.loads(ballot["raw"])["rationale"] == "kinder" for ballot in label)
        assert all((b["times_asked"], b["served_model"], b["question"]["model"]) == (1, "judge-2026-11-01", "judge") for b in label)


def test_a_prompt_without_a_pair_says_why(judged: RunDir) -> None:
    found = audit(judged, make_prompt("Say bye").id, 1)
    assert (found["pair"], found["verdict"], found["why_no_verdict"]) == (None, None, "all 2 answers are the same")


@pytest.mark.parametrize(("name", "round_number"), [("nobody", None), ("", None), ("nobody", 1), ("nobody", 0)])
def test_an_id_that_nothing_has_is_told(judged: RunDir, name: str, round_number: int | None) -> None:
    with pytest.raises(InputError, match=r"judged"):
        audit(judged, name, round_number)


def test_the_command_prints_it_for_people_and_machines(judged: RunDir) -> None:
    name = make_prompt("Say hello").id
    shown = CliRunner().invoke(main, ["show", str(judged.path), "--pair", name])
    assert shown.exit_code == 0, shown.output
    assert "raw reply: " in shown.output
    assert shown.output.rstrip().splitlines()[-1].startswith("pair: chosen ")
    told = CliRunner().invoke(main, ["show", str(judged.path), "--pair", name, "--json"])
    assert json.loads(told.output)["prompt_id"] == name
