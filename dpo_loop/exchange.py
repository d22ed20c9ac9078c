"""The files that rooms hand to one another: a name and a reader for each, so that no room imports another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter

from dpo_loop.files import read_jsonl
from dpo_loop.types import (
    Ballot,
    CapabilityRow,
    Comparison,
    Completion,
    Conditions,
    GateReport,
    GradeRow,
    JudgeCanary,
    PreferencePair,
    Prompt,
    PromptJudgement,
    PromptSet,
)

PROMPTS = "prompts.jsonl"
PAIRS = "pairs.jsonl"
DROPPED = "dropped.jsonl"
"""Rows of {"prompt_id", "reason", ...}: what a stage left out and why."""
PROMPT_TOO_LONG = "prompt_too_long"
"""The reason of a prompt that leaves no room for an answer in the engine's context."""
JUDGEMENTS = "judgements.jsonl"
BALLOTS = "ballots.jsonl"
METRICS = "metrics.jsonl"
ALARMS = "alarms.jsonl"
"""Of training: rows of {"name", "level", "step", "value", "limit", "message"}, empty where nothing was wrong."""
GRADES = "grades.jsonl"
COMPARISONS = "comparisons.jsonl"
GATE_REPORT = "gate_report.json"
JUNIT = "junit.xml"
CANARY = "canary.json"
CONDITIONS = "conditions.json"
MIN_EFFECT = 0.5
"""Of the adapter canary: an engine that shows less of an adapter's effect is closer to the bare base than to the policy."""
CAPABILITY = "capability.jsonl"
MIN_DOCUMENTS = 10
"""Of a perplexity: limits over fewer say nothing, so the stage `capability` refuses such a file, and the gate such rows."""
JUDGE_CANARY = "judge_canary.json"
HEURISTIC = "heuristic"
"""What a keyword heuristic is called where graders are named."""
PROMPT_SETS = "prompt_sets.json"

# Of stages whose rooms load torch: here, so that a flow can compare them with a published one at no cost.
SEED_VERSION = 2
TRAIN_VERSION = 2


def completions_file(shard: int) -> str:
    return f"completions-{shard:05d}.jsonl"


def read_prompts(stage_dir: Path) -> Iterator[Prompt]:
    return read_jsonl(stage_dir / PROMPTS, Prompt)


def read_completions(stage_dir: Path) -> Iterator[Completion]:
    """All shards in order: by prompt as in prompts.jsonl, then by k."""
    for path in sorted(stage_dir.glob("completions-*.jsonl")):
        yield from read_jsonl(path, Completion)


def read_judgements(stage_dir: Path) -> Iterator[PromptJudgement]:
    return read_jsonl(stage_dir / JUDGEMENTS, PromptJudgement)


def read_ballots(stage_dir: Path) -> Iterator[Ballot]:
    return read_jsonl(stage_dir / BALLOTS, Ballot)


def read_pairs(stage_dir: Path) -> Iterator[PreferencePair]:
    return read_jsonl(stage_dir / PAIRS, PreferencePair)


def read_grades(stage_dir: Path) -> Iterator[GradeRow]:
    return read_jsonl(stage_dir / GRADES, GradeRow)


def read_comparisons(stage_dir: Path) -> Iterator[Comparison]:
    return read_jsonl(stage_dir / COMPARISONS, Comparison)


def read_capability(stage_dir: Path) -> Iterator[CapabilityRow]:
    return read_jsonl(stage_dir / CAPABILITY, CapabilityRow)


def read_conditions(stage_dir: Path) -> Conditions:
    return Conditions.model_validate_json((stage_dir / CONDITIONS).read_bytes())


def read_judge_canary(stage_dir: Path) -> JudgeCanary | None:
    """None where a program graded, which has no canary."""
    path = stage_dir / JUDGE_CANARY
    return JudgeCanary.model_validate_json(path.read_bytes()) if path.is_file() else None


def read_prompt_sets(stage_dir: Path) -> tuple[PromptSet, ...]:
    """Empty where nobody said where the prompts come from."""
    if not (stage_dir / PROMPT_SETS).is_file():
        return ()
    return TypeAdapter(tuple[PromptSet, ...]).validate_json((stage_dir / PROMPT_SETS).read_bytes())


def read_gate_report(stage_dir: Path) -> GateReport:
    return GateReport.model_validate_json((stage_dir / GATE_REPORT).read_bytes())
