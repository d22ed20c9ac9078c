"""One side of train_vs_trl in a process of its own, so that its peak memory is its own: `python -m tests.benchmarks.training_side SPEC.json`.

It reads commands from stdin, a JSON object a line, and answers each with one on stdout; what libraries print goes to stderr.
    {"do": "gradients", "to": PATH}     a pass without optimizer step, gradients written to PATH as safetensors; it warms the side up, too
    {"do": "pass", "online": bool}      {"wall_s", "cpu_s", "peak_bytes"}
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.benchmarks.shapes import IdPair


def build_side(spec: dict[str, Any]) -> Any:
    pairs = [IdPair(*map(tuple, row)) for row in json.loads(Path(spec["pairs"]).read_text())]
    same = {name: spec[name] for name in ("micro_pairs", "pairs_per_step", "checkpointing", "device")}
    if spec["side"] == "ours":
        from tests.benchmarks.our_side import OurSide

        return OurSide(spec["model"], pairs, rank=spec["rank"], **same)
    from tests.benchmarks.trl_side import TrlSide

    return TrlSide(spec["model"], pairs, out=Path(spec["out"]), lora=spec["lora"], **same)


def forget_peak(cuda: bool) -> None:
    """From now on peak() tells of what comes; where the kernel does not allow that, it tells of the whole process."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("VmHWM cannot be reset here: peaks are of the whole process", file=sys.stderr)


def peak(cuda: bool) -> int:
    """Bytes: resident set of this process, or what torch allocated on the GPU."""
    return int(torch.cuda.max_memory_allocated()) if cuda else resident("VmHWM")


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def timed_pass(side: Any, *, online: bool, cuda: bool) -> dict[str, float]:
    forget_peak(cuda)
    wall, cpu = time.perf_counter(), time.process_time()
    side.one_pass(online=online)
    if cuda:
        torch.cuda.synchronize()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "peak_bytes": peak(cuda)}


def matmul_flops_per_s() -> float:
    """What the card reaches on square bf16 matrices of 8,192: the rate that MFU is a share of."""
    size, times = 8_192, 20
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for repeats in (5, times):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            left @ right
        torch.cuda.synchronize()
    return 2 * size**3 * times / (time.perf_counter() - began)


def trunk_parameters(model: Any) -> int:
    """Weights that every token is multiplied with, adapters and embeddings left out."""
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and ".lora_" not in name and id(p) not in embeddings)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(Path(sys.argv[1]).read_text())
    cuda = spec["device"] == "cuda"
    torch.set_num_threads(spec["threads"])
    facts: dict[str, Any] = {}
    if cuda:
        facts["matmul_flops_per_s"] = matmul_flops_per_s()
        if spec["limit_bytes"] is not None:
            torch.cuda.set_per_process_memory_fraction(spec["limit_bytes"] / torch.cuda.get_device_properties(0).total_memory)
    side = build_side(spec)
    facts |= {**side.facts, "trunk_parameters": trunk_parameters(side.model), "resident_bytes": resident("VmRSS")}
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "gradients":
                save_file(side.gradients(), command["to"])
                answer = {}
            case "pass":
                answer = timed_pass(side, online=command["online"], cuda=cuda)
            case _:
                raise SystemExit(f"what is {command['do']!r}?")
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
