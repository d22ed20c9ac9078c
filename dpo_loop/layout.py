"""The only file that spells a path of a run directory.

runs/demo/
  run.json               resolved config of the run
  current.json           the blessing of the policy that generates next; one atomic write promotes
  ledger.sqlite          every judge call
  index.html             the report over all rounds
  approvals/<sha256>.json   a person's decision about one gate report
  anchors.jsonl          where people moved the anchor to; waivers.jsonl: checks that they let be broken for a while
  exports.jsonl          what was exported, and what was forced out
  logs/001-train.log     output of each stage's process
  rounds/000/            round 0 prepares and grades the start policy, the anchor
  rounds/001/parent.json  the blessing of the policy that this round generates with, pinned when it begins
  rounds/001/terms.json  the anchor and the waivers that hold for this round, pinned when it begins
  rounds/001/<stage>/manifest.json
  rounds/001/failed/<stage>.json   why a stage could not finish
  rounds/001/trackers/   what was sent to TensorBoard and its like while training
  rounds/001/round.json  the end of the round
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STAGES_OF_ROUND_0 = (
    "world",
    "seed",
    "evalset",
    "reserve",
    "answer",
    "capability",
    "grade",
    "answer_again",
    "grade_again",
    "report",
)
TOP_UP = ("more_candidate", "more_previous", "more_anchor", "grade_more")
"""The reserve of evaluation prompts answered by all three policies and graded, where `look`, the gate's first look, could not decide."""
STAGES = ("prompts", "generate", "judge", "pair", "train", "answer", "capability", "grade", "look", *TOP_UP, "gate", "report")

SAME_AS = {
    "answer_again": "answer",
    "more_candidate": "answer",
    "more_previous": "answer",
    "more_anchor": "answer",
    "grade_again": "grade",
    "grade_more": "grade",
    "look": "gate",
    "reserve": "evalset",
}
"""Stages that do what another does, with other inputs: what is configured for that one is for them too."""
JUDGE_TEST = "judgetest"
"""The first stage of every round whose judge is no program."""


@dataclass(frozen=True, slots=True)
class RoundDir:
    path: Path

    @property
    def number(self) -> int:
        return int(self.path.name)

    @property
    def manifest(self) -> Path:
        return self.path / "round.json"

    @property
    def parent(self) -> Path:
        return self.path / "parent.json"

    @property
    def terms(self) -> Path:
        return self.path / "terms.json"

    def stage(self, name: str) -> Path:
        return self.path / name

    def failure(self, stage: str) -> Path:
        return self.path / "failed" / f"{stage}.json"

    @property
    def gate_report(self) -> Path:
        return self.stage("gate") / "gate_report.json"

    @property
    def report_page(self) -> Path:
        return self.stage("report") / "report.html"

    @property
    def blessing(self) -> Path:
        return self.path / "blessing.json"


@dataclass(frozen=True, slots=True)
class RunDir:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "run.json"

    @property
    def current(self) -> Path:
        return self.path / "current.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def anchors(self) -> Path:
        return self.path / "anchors.jsonl"

    @property
    def waivers(self) -> Path:
        return self.path / "waivers.jsonl"

    @property
    def exports(self) -> Path:
        return self.path / "exports.jsonl"

    @property
    def export_lock(self) -> Path:
        return self.path / ".export.lock"

    @property
    def lease(self) -> Path:
        return self.path / ".lease"

    @property
    def index_page(self) -> Path:
        return self.path / "index.html"

    def round(self, number: int) -> RoundDir:
        return RoundDir(self.path / "rounds" / f"{number:03d}")

    def rounds(self) -> list[RoundDir]:
        """Rounds that have begun, in order."""
        return [RoundDir(path) for path in sorted((self.path / "rounds").glob("[0-9][0-9][0-9]")) if path.is_dir()]

    def log(self, round_number: int, stage: str) -> Path:
        return self.path / "logs" / f"{round_number:03d}-{stage}.log"

    def approval(self, report_sha256: str) -> Path:
        return self.path / "approvals" / f"{report_sha256}.json"
