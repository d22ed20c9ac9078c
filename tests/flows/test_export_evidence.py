"""What an export rests on: a blessing, a gate report or a decision that does not fit the others lets nothing out, also by force."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.artifacts import sha256_file
from dpo_loop.errors import CorruptArtifactError, DecisionError
from dpo_loop.files import write_json
from dpo_loop.layout import RunDir
from dpo_loop.policies import read_policy
from dpo_loop.types import GateState, HumanDecision
from flows.card import card_of
from tests.flows.exports import FORCE, bless, refused


@pytest.fixture
def run(exportable: RunDir, tmp_path: Path) -> RunDir:
    """A copy that may be changed."""
    return RunDir(shutil.copytree(exportable.path, tmp_path / "run"))


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_blessing_whose_gate_report_was_changed_is_not_believed_even_by_force(run: RunDir, tmp_path: Path) -> None:
    report = run.round(1).gate_report
    text = report.read_text()
    report.write_text(text.replace("because it is PASS", "because I say so"))
    for what in ("adapter", "pairs"):
        refused(run, tmp_path / "out", "gate_report.json has changed since stage gate published it", CorruptArtifactError, what=what, round_number=1, force=FORCE)  # fmt: skip
    manifest = report.parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace(sha256_of(text), sha256_file(report)))
    match = "blesses the policy of round 1 by a gate report that .*gate_report.json is not.*--force does not help"
    refused(run, tmp_path / "out", match, CorruptArtifactError, what="adapter", round_number=1, force=FORCE)
    report.unlink()
    refused(run, tmp_path / "out", "is missing, though the manifest", CorruptArtifactError, what="adapter", round_number=1)


def test_a_blessing_of_another_policy_than_the_one_that_was_graded_is_not_believed(run: RunDir, tmp_path: Path) -> None:
    failed, path = read_policy(run.round(2).stage("train")), run.round(1).blessing
    blessing = json.loads(path.read_text())
    blessing["policy"] |= {"adapter": "rounds/002/train/adapter", "adapter_sha256": failed.adapter_sha256}
    path.write_text(json.dumps(blessing))
    match = f"blesses policy {failed.key}, but the gate report that it names graded"
    refused(run, tmp_path / "out", match, CorruptArtifactError, what="adapter", round_number=1)


def approval(run: RunDir, number: int, decision: str = "approve") -> HumanDecision:
    """Written by hand, for a round that nobody was asked about."""
    sha256 = sha256_file(run.round(number).gate_report)
    decided = HumanDecision.model_validate(
        {"decision": decision, "reviewer": "eve", "reason": "x", "report_sha256": sha256, "decided_at": "2026-01-02"}
    )
    write_json(run.approval(sha256), decided)
    return decided


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"report_sha256": None, "gate_state": None}, "blesses the policy of round 2 without a gate report"),
        ({"report_sha256": None}, "without a gate report"),
        ({"report_sha256": "f" * 64}, "by a gate report that .* is not"),
        ({}, "round 2, but its gate said FAIL and nobody's approval"),
        ({"gate_state": GateState.PASS}, "round 2 as PASS, but its gate said FAIL"),
        ({"gate_state": None}, "round 2 as None, but its gate said FAIL"),
        ({"round": 1}, "a policy of round 1, but lies in round 2"),
        ({"round": 0, "report_sha256": None, "gate_state": None}, "a policy of round 0, but lies in round 2"),
    ],
)
def test_a_blessing_that_a_failed_candidate_was_given_by_hand_lets_nothing_out(
    run: RunDir, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    """A reviewer wrote rounds/003/blessing.json beside a FAIL, without or with the report's real hash: export ended with 0, `forced` null."""
    bless(run, 2, **changes)
    for what, force in (("adapter", None), ("adapter", FORCE), ("pairs", None)):
        refused(run, tmp_path / "out", match, CorruptArtifactError, what=what, round_number=2, force=force)
    refused(run, tmp_path / "out", match, CorruptArtifactError, what="pairs")
    shutil.copyfile(run.round(2).blessing, run.current)
    refused(run, tmp_path / "out", "blesses|is not what .* says", CorruptArtifactError, what="adapter")
    with pytest.raises(CorruptArtifactError, match=match):
        card_of(run, 2)


def test_a_fail_is_not_promoted_by_an_approval_either(run: RunDir, tmp_path: Path) -> None:
    bless(run, 2, decision=approval(run, 2))
    refused(run, tmp_path / "out", "its gate said FAIL and nobody's", CorruptArtifactError, what="adapter", round_number=2)


def test_a_round_that_waits_is_blessed_by_the_approval_that_is_kept_and_no_other(run: RunDir, tmp_path: Path) -> None:
    def tried(match: str, error: type[Exception] = CorruptArtifactError) -> None:
        refused(run, tmp_path / "out", match, error, what="adapter", round_number=4)

    bless(run, 4)
    tried("its gate said INCONCLUSIVE and nobody's approval of that report is kept")
    rejected = approval(run, 4, "reject")
    bless(run, 4, decision=rejected)
    tried("its gate said INCONCLUSIVE and nobody's approval")
    bless(run, 4, decision=rejected.model_copy(update={"decision": "approve"}))
    tried("nobody's approval")
    approved = approval(run, 4)
    bless(run, 4, decision=approved.model_copy(update={"reviewer": "bob"}))
    tried("round 4 by another decision than the one that is kept")
    path = run.approval(approved.report_sha256)
    path.write_text(path.read_text().replace(approved.report_sha256, "0" * 64))
    tried("decides about another report", DecisionError)


def test_a_blessing_against_the_round_s_own_end_or_the_start_policy_is_not_believed(run: RunDir, tmp_path: Path) -> None:
    manifest = run.round(1).manifest
    manifest.write_text(manifest.read_text().replace('"promoted": true', '"promoted": false', 1))
    refused(run, tmp_path / "out", "says that it was not promoted", CorruptArtifactError, what="adapter", round_number=1)
    path = run.round(0).blessing
    start = json.loads(path.read_text())
    failed = json.loads((run.round(2).stage("train") / "policy.json").read_text())
    for changes, match in (({"policy": failed}, "but round 0 made"), ({"gate_state": "PASS"}, "by a gate, and round 0 has none")):
        path.write_text(json.dumps(start | changes))
        refused(run, tmp_path / "out", match, CorruptArtifactError, what="adapter", round_number=0)


def test_a_current_policy_that_no_round_blessed_is_not_exported(run: RunDir, tmp_path: Path) -> None:
    run.round(3).blessing.unlink()
    refused(run, tmp_path / "out", r"current.json is not what .*003/blessing.json says", CorruptArtifactError, what="adapter")


def test_a_gate_report_that_was_changed_is_quoted_nowhere(run: RunDir, tmp_path: Path) -> None:
    """Also where a person forces what it failed, and in the lineage of later rounds."""
    report = run.round(2).gate_report
    report.write_text(report.read_text().replace("FAIL", "PASS"))
    match = "gate_report.json has changed since stage gate published it"
    for what in ("adapter", "pairs"):
        refused(run, tmp_path / "out", match, CorruptArtifactError, what=what, round_number=2, force=FORCE)
    with pytest.raises(CorruptArtifactError, match=match):
        card_of(run, 2)
    later = "round 3 follows report .* of round 2, and the one that is there is another"
    refused(run, tmp_path / "out", later, CorruptArtifactError, what="adapter")
    with pytest.raises(CorruptArtifactError, match=later):
        card_of(run, 3)
    manifest = report.parent / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": {}}))
    refused(run, tmp_path / "out", "the manifest beside it does not list it", CorruptArtifactError, what="adapter", round_number=2, force=FORCE)  # fmt: skip


def test_a_report_that_was_changed_together_with_its_manifest_is_given_away_by_the_one_after_it(
    run: RunDir, tmp_path: Path
) -> None:
    report, before = run.round(2).gate_report, sha256_file(run.round(2).gate_report)
    report.write_text(report.read_text().replace("because it is FAIL", "because it was late"))
    manifest = report.parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace(before, sha256_file(report)))
    refused(run, tmp_path / "out", "the gate report of round 3 follows report .* is another", CorruptArtifactError, what="adapter")


def test_the_report_of_another_round_and_another_candidate_is_quoted_nowhere(run: RunDir) -> None:
    stage = run.round(2).stage("gate")
    shutil.rmtree(stage)
    shutil.copytree(run.round(1).stage("gate"), stage)
    with pytest.raises(CorruptArtifactError, match="is the report of round 1 of run small, not of this one"):
        card_of(run, 2)
    shutil.copyfile(run.round(2).stage("train") / "policy.json", run.round(4).stage("train") / "policy.json")
    with pytest.raises(CorruptArtifactError, match="but its gate graded"):
        card_of(run, 4)


def test_a_round_s_end_that_tells_of_another_verdict_than_the_gate_is_not_in_a_lineage(run: RunDir) -> None:
    manifest = run.round(2).manifest
    told = json.loads(manifest.read_text())
    told["summary"]["gate"] = "PASS"
    manifest.write_text(json.dumps(told))
    with pytest.raises(CorruptArtifactError, match="the gate of round 2 said PASS, but the gate's own report says FAIL"):
        card_of(run, 3)
