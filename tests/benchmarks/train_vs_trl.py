"""Our training against TRL's DPOTrainer, side by side. `python -m tests.benchmarks.train_vs_trl [--json] [--cases 256/128,512/128,128/256]`

Both sides train LoRA on the same pairs of random token ids, of P prompt and C completion tokens give or take a quarter, with the same base,
adapter weights, dtype, checkpointing, optimizer, number of threads and pairs per micro-batch. Each is a process of its own; they take turns
and never compute at the same time. Timed is one epoch, its optimizer steps included: in a first table with the reference computed before
(and that pass told apart), in a second with the reference on-line. Ratios are medians over the turns, with the least and the greatest.

    speed_ratio     our pairs/s over TRL's, reference precomputed          memory_ratio    our peak resident set over TRL's
    grad_rel_diff   relative L2 distance of the LoRA gradients over all pairs

--model DIR: any transformers directory in place of a random model of --shape. --device cuda: bf16, peak memory is what torch allocated,
MFU against the card's measured matrix rate, and the 7b shape held to 24 GiB, with checkpointing on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from dpo_loop.openmp import wait_briefly
from tests.benchmarks.shapes import Case, IdPair, draw_pairs, relative_l2, vocabulary

SIDES = ("ours", "trl")
LIMIT_OF_7B = 24 * 2**30


class Side:
    """A child process that holds one side, and computes only while it is asked."""

    def __init__(self, name: str, folder: Path, spec: dict[str, Any]) -> None:
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**spec, "side": name, "out": str(folder / name)}))
        self.name, self.log = name, folder / f"{name}.log"
        self.errors = self.log.open("w")
        wait_briefly()  # the product's setting, for both
        same = {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.training_side", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True, env={**os.environ, **same},
        )  # fmt: skip
        self.facts = self._answer()

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise SystemExit(f"the side {self.name} ended with {code}:\n{self.log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def measure(case: Case, model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The row of one case."""
    pairs = draw_pairs(case, given.pairs, vocab_size=vocabulary(model))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pairs.json").write_text(json.dumps(pairs))
        spec = {
            "model": str(model), "pairs": str(folder / "pairs.json"), "rank": 16, "micro_pairs": given.micro_pairs,
            "pairs_per_step": 4 * given.micro_pairs, "checkpointing": given.checkpointing, "device": given.device,
            "threads": given.threads, "limit_bytes": LIMIT_OF_7B if given.device == "cuda" and given.shape == "7b" else None,
        }  # fmt: skip
        sides = {}
        try:
            sides["ours"] = Side("ours", folder, spec)
            sides["trl"] = Side("trl", folder, {**spec, "lora": sides["ours"].facts["lora"]})
            for side in SIDES:
                sides[side].ask(do="gradients", to=str(folder / f"{side}.safetensors"))
            difference = relative_l2(*(load_file(folder / f"{side}.safetensors") for side in SIDES))
            passes = {online: take_turns(sides, given.repeats, online=online) for online in (False, True)}
        finally:
            for started in sides.values():
                started.close()
    facts = {side: sides[side].facts for side in SIDES}
    return row_of(case, pairs, passes, facts) | {"grad_rel_diff": difference}


def take_turns(sides: dict[str, Side], repeats: int, *, online: bool) -> dict[str, list[dict[str, float]]]:
    passes: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(repeats):
        for side in SIDES:
            passes[side].append(sides[side].ask(do="pass", online=online))
        said = ", ".join(
            f"{side} {passes[side][-1]['wall_s']:.1f} s {passes[side][-1]['peak_bytes'] / 1e6:,.0f} MB" for side in SIDES
        )
        print(f"turn {turn + 1}/{repeats}, reference {'on-line' if online else 'precomputed'}: {said}", file=sys.stderr, flush=True)
    return passes


def row_of(
    case: Case, pairs: list[IdPair], passes: dict[bool, dict[str, list[dict[str, float]]]], facts: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": case.prompt,
        "completion": case.completion,
        "packed": facts["ours"]["packed"],
        "reason": facts["ours"]["reason"],
    }
    for online, opening in ((False, ""), (True, "online_")):
        ours, trl = (passes[online][side] for side in SIDES)
        for unit, name in (("wall_s", "speed_ratio"), ("cpu_s", "cpu_time_ratio")):
            ratios = [theirs[unit] / mine[unit] for mine, theirs in zip(ours, trl, strict=True)]
            row |= {f"{opening}{name}": median(ratios), f"{opening}{name}_range": [min(ratios), max(ratios)]}
        peaks = [max(turn["peak_bytes"] for turn in side) for side in (ours, trl)]
        row |= {f"{opening}memory_ratio": peaks[0] / peaks[1]}
        for side, peak in zip(SIDES, peaks, strict=True):
            wall_s = median(turn["wall_s"] for turn in passes[online][side])
            row |= {
                f"{opening}{side}_pairs_per_s": len(pairs) / wall_s,
                f"{opening}{side}_tokens_per_s": sum(map(num_tokens, pairs)) / wall_s,
                f"{opening}{side}_peak_mb": peak / 1e6,
            }
    for side in SIDES:
        row |= {
            f"{side}_precompute_s": facts[side]["precompute_s"],
            f"{side}_resident_before_mb": facts[side]["resident_bytes"] / 1e6,
        }
        if "matmul_flops_per_s" in facts[side]:
            row[f"{side}_mfu"] = row[f"{side}_pairs_per_s"] / len(pairs) * model_flops(pairs, side, facts[side])
    return row


def num_tokens(pair: IdPair) -> int:
    """Tokens of a pair as TRL forwards it, padding left out: the unit of tokens/s on both sides."""
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def model_flops(pairs: list[IdPair], side: str, facts: dict[str, Any]) -> float:
    """FLOPs that one epoch needs, over the card's rate: forward and backward are 2 per weight and token each, since a frozen weight has no
    gradient of its own. Head, attention and recomputation are left out, and a shared prompt counts once, so neither side is flattered."""
    tokens = sum(num_tokens(pair) - (len(pair.prompt) if side == "ours" and facts["packed"] else 0) for pair in pairs)
    return float(4 * facts["trunk_parameters"] * tokens / facts["matmul_flops_per_s"])


def show(rows: list[dict[str, Any]]) -> None:
    console = Console(width=150)
    for opening, title in (("", "reference precomputed on both sides"), ("online_", "reference on-line on both sides")):
        table = Table(title=title, title_justify="left")
        for heading in (
            "P/C",
            "x pairs/s",
            "least..most",
            "x by CPU time",
            "x memory",
            "pairs/s ours|TRL",
            "tokens/s ours|TRL",
            "peak MB ours|TRL",
        ):
            table.add_column(heading, justify="right")
        for row in rows:
            least, most = row[f"{opening}speed_ratio_range"]
            table.add_row(
                f"{row['prompt']}/{row['completion']}", f"{row[f'{opening}speed_ratio']:.2f}", f"{least:.2f}..{most:.2f}",
                f"{row[f'{opening}cpu_time_ratio']:.2f}", f"{row[f'{opening}memory_ratio']:.2f}",
                *(" | ".join(f"{row[f'{opening}{side}_{unit}']:{form}}" for side in SIDES)
                  for unit, form in (("pairs_per_s", ".3f"), ("tokens_per_s", ",.0f"), ("peak_mb", ",.0f"))),
            )  # fmt: skip
        console.print(table)
    for row in rows:
        mfu = f"; MFU ours {row['ours_mfu']:.1%}, TRL {row['trl_mfu']:.1%}" if "ours_mfu" in row else ""
        console.print(
            f"P/C {row['prompt']}/{row['completion']}: gradients differ by {row['grad_rel_diff']:.1e} (relative L2), {row['reason']}; "
            f"reference pass ours {row['ours_precompute_s']:.1f} s, TRL {row['trl_precompute_s']:.1f} s; resident before training ours "
            f"{row['ours_resident_before_mb']:,.0f} MB, TRL {row['trl_resident_before_mb']:,.0f} MB{mfu}",
            highlight=False,
        )  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Our training against TRL's DPOTrainer: speed, memory, gradients.")
    parser.add_argument("--json", action="store_true", help="the figures as JSON on the last line")
    parser.add_argument("--cases", default="256/128,512/128,128/256", help="prompt/completion tokens, comma-separated")
    parser.add_argument("--model", type=Path, help="a transformers model directory; default: random weights of --shape")
    parser.add_argument("--shape", default="25m", choices=["25m", "1.5b", "7b"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--micro-pairs", type=int, default=4, help="pairs per micro-batch, on both sides")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    given = parser.parse_args(words)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device on this machine; leave the option out to measure on the CPU")
    if given.pairs % given.micro_pairs or given.pairs < 1:
        raise SystemExit(
            f"--pairs {given.pairs} is not a multiple of --micro-pairs {given.micro_pairs}: TRL would weigh the last ones more"
        )
    given.checkpointing = given.checkpointing or given.shape == "7b"
    cases = [Case(*map(int, text.split("/"))) for text in given.cases.split(",")]
    with tempfile.TemporaryDirectory() as name:
        model = given.model
        if model is None:
            model = Path(name)
            command = [sys.executable, "-m", "tests.benchmarks.shapes", given.shape, name, "--device", given.device]
            subprocess.run(
                command, check=True, stderr=subprocess.DEVNULL
            )  # in a process of its own: the memory it took is gone before anything is measured
        rows = [measure(case, model, given) for case in cases]
    show(rows)
    if given.json:
        print(json.dumps({"cases": rows}))


if __name__ == "__main__":
    main()
