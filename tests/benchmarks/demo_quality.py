"""Does the loop make the policy better, from every seed? `python -m tests.benchmarks.demo_quality [--seeds 3] [--json]`

Plays the demo from its config once per seed (world, SFT, prompts, sampling and training all change with it) and compares the
held-out pass rate of the last promoted round with round 0's. About five minutes a seed on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "deploy" / "configs" / "demo.yaml"


def play(seed: int, run_dir: Path) -> dict[str, Any]:
    """One whole run in child processes. Returns its rounds as `dpo-loop show --json` prints them, and the seconds it took."""
    changes = [f"run_dir={run_dir}", f"run_id=quality-{seed}", f"seed={seed}", f"world.seed={seed}"]
    started = time.monotonic()
    command = [sys.executable, "-m", "flows.cli", "run", str(CONFIG), *(word for change in changes for word in ("--set", change))]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=sys.stderr)
    seconds = time.monotonic() - started
    shown = subprocess.run(
        [sys.executable, "-m", "flows.cli", "show", str(run_dir), "--json"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(shown.stdout.splitlines()[-1]) | {"seconds": seconds}


def figures(seed: int, played: dict[str, Any]) -> dict[str, Any]:
    rounds = played["rounds"]
    last = max((row for row in rounds if row["promoted"]), key=lambda row: row["round"], default=rounds[0])
    return {
        "seed": seed,
        "pass_rates": [row["pass_rate"] for row in rounds],
        "gates": [row["gate"] for row in rounds],
        "last_promoted_round": last["round"],
        "gain": round(last["pass_rate"] - rounds[0]["pass_rate"], 4),
        "harmful_rates": [row["harmful_rate"] for row in rounds],
        "over_refusal_rates": [row["over_refusal_rate"] for row in rounds],
        "seconds": round(played["seconds"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="keep the run directories here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = (options.keep or Path(scratch)).resolve()
        rows = [figures(seed, play(seed, home / f"seed-{seed}")) for seed in range(1, options.seeds + 1)]
    table = Table("seed", "pass rate by round", "gates", "gain, points", "harmful", "over-refusal", "seconds", title="demo quality")
    for row in rows:
        rates = [
            " → ".join(f"{100 * rate:.1f}" for rate in row[name]) for name in ("pass_rates", "harmful_rates", "over_refusal_rates")
        ]
        gates = " ".join(str(gate or "-") for gate in row["gates"])
        table.add_row(str(row["seed"]), rates[0], gates, f"{100 * row['gain']:+.1f}", rates[1], rates[2], f"{row['seconds']:.0f}")
    Console(width=140).print(table)
    if options.json:
        sys.stdout.write(json.dumps({"seeds": rows, "min_gain": min(row["gain"] for row in rows)}) + "\n")


if __name__ == "__main__":
    main()
