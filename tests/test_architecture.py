"""Decisions that a reader may rely on, pinned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
HEAVY = ("torch", "vllm", "transformers", "prefect", "openai", "anthropic", "scipy", "matplotlib", "datasets")
CONFIGS = sorted((REPOSITORY / "deploy" / "configs").glob("*.yaml"))
SOURCES = sorted(path for package in ("dpo_loop", "judges", "flows", "tests") for path in (REPOSITORY / package).rglob("*.py"))


def test_importing_the_packages_and_the_command_line_loads_nothing_heavy() -> None:
    code = f"import sys, dpo_loop, judges, flows, flows.cli, flows.config; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"


def test_there_are_configs_to_load() -> None:
    assert {"demo.yaml", "demo-overheated.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_comments_every_key(path: Path) -> None:
    from flows.config import load_config

    load_config(path, [])
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        key = line.strip().removeprefix("- ")
        if key and not key.startswith("#") and ":" in key and not key.startswith("{"):
            above, beside = lines[number - 1].strip() if number else "", "#" in line
            inside_list = line.lstrip().startswith(("-", "{"))
            assert above.startswith("#") or beside or inside_list, f"{path.name}:{number + 1} has no comment: {line}"


def test_no_file_names_this_machine() -> None:
    here = os.fspath(REPOSITORY.parent) + os.sep
    if here == os.sep * 2:
        pytest.skip("the checkout lies at the root of the file system, where every absolute path would match")
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout.split()
    found = [name for name in listed if here in (REPOSITORY / name).read_text(errors="replace")]
    assert found == []


def test_files_stay_small_enough_to_read() -> None:
    lengths = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 420} == {}
    assert not [name for name in lengths if Path(name).stem == "utils"]
