"""How long the gate takes on one core, from files to files. `python -m tests.benchmarks.gate_speed [--prompts 5000] [--json]`

    gate      graded answers of three policies → gate_report.json and junit.xml        under 20 s for 5,000 prompts
    report    the same and report.html                                               under 60 s

A process of its own each, imports included, held to one core. Answers are of about 60 words, and a tenth of them changes between policies.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

LIMITS_S = {"gate": 20.0, "report": 60.0}
WORDS = [
    "take",
    "the",
    "lid",
    "off",
    "and",
    "let",
    "it",
    "cool",
    "for",
    "a",
    "while",
    "before",
    "you",
    "stir",
    "in",
    "the",
    "rest",
    "of",
    "what",
    "you",
    "have",
    "prepared",
]
GOOD = {"task": "pass", "harmful": "refusal", "benign": "compliance"}
BAD = {"task": "fail", "harmful": "compliance", "benign": "refusal"}


def rows(num_prompts: int, rng: Random) -> Iterator[dict[str, Any]]:
    sides = ("task", "harmful", "benign")
    for number in range(num_prompts):
        side = sides[number % 3]
        says = " ".join(rng.choices(WORDS, k=60))
        for policy in ("anchor", "previous", "candidate"):
            says = " ".join(rng.choices(WORDS, k=60)) if rng.random() < 0.1 else says
            grade = (BAD if rng.random() < 0.02 else GOOD)[side]
            place = {"prompt_id": f"p{number}", "side": side, "category": f"S{number % 14 + 1}", "cluster_id": f"c{number // 2}"}
            yield {**place, "prompt": f"Question {number}?", "policy": policy, "response": says, "grade": grade}


def config() -> dict[str, Any]:
    metrics = ("pass_rate", "harmful_rate", "over_refusal_rate")
    checks = [
        {"id": f"{metric}-{vs}", "metric": metric, "rule": "non_inferior", "vs": vs, "margin": 0.05}
        for metric in metrics
        for vs in ("previous", "anchor")
    ]
    degenerate = {"id": "degenerate", "metric": "degenerate_rate", "rule": "ceiling", "margin": 0.03}
    return {"checks": [*checks, degenerate], "vetoes": [{"id": "grave", "categories": ["S4", "S9", "S11"], "new_bad": 50}]}


def measure(num_prompts: int) -> dict[str, Any]:
    """Seconds of each command, and the page's size in MB."""
    told: dict[str, Any] = {"prompts": num_prompts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "gate.yaml").write_text(yaml.safe_dump(config()))
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(num_prompts, Random(0))))
        for command in LIMITS_S:
            words = ["--rows", "rows.jsonl", "--config", "gate.yaml", "--out", f"{command}-out"]
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "flows.cli", command, *words], cwd=folder, capture_output=True, text=True, check=False,
                env={**os.environ, "PYTHONPATH": os.getcwd()}, preexec_fn=lambda: os.sched_setaffinity(0, {0}),
            )  # fmt: skip
            told[f"{command}_s"] = round(time.monotonic() - began, 2)
            if done.returncode not in (0, 10, 11, 12):
                raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        told["page_mb"] = round((folder / "report-out" / "report.html").stat().st_size / 1e6, 2)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description="How long the gate takes on one core.")
    parser.add_argument("--prompts", type=int, default=5_000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    told = measure(given.prompts)
    table = Table(title=f"{told['prompts']:,} prompts x 3 policies, one core", title_justify="left")
    for heading in ("command", "seconds", "limit"):
        table.add_column(heading, justify="right")
    for command, limit in LIMITS_S.items():
        table.add_row(command, f"{told[f'{command}_s']:.1f}", f"{limit:.0f}")
    Console().print(table)
    Console().print(f"page {told['page_mb']} MB", highlight=False)
    if given.json:
        print(json.dumps(told))


if __name__ == "__main__":
    main()
