"""Checkpoints inside a stage's scratch: a directory each, written aside, fsynced, renamed; the older ones pruned.

    checkpoints/step-00000050/state.pt        tensors and plain values only, so that loading runs no code
    checkpoints/step-00000050/manifest.json   its sha256, what it was made from, and under which circumstances

One counts only if its manifest verifies: the state has the recorded sha256, and it was made from what training is made from now. A
scratch belongs to one stage key, so another origin means that files below the inputs were exchanged. There is no RNG state: whatever
is drawn is drawn from (seed, step, process).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dpo_loop.artifacts import sha256_file
from dpo_loop.errors import CorruptArtifactError
from dpo_loop.files import sync_directory, sync_tree, write_json, write_jsonl
from dpo_loop.journal import Journal
from dpo_loop.progress import say
from dpo_loop.types import Record

KEPT = 2
"""The newest, and one before it in case the disk damaged the newest."""
STATE, MANIFEST = "state.pt", "manifest.json"


class CheckpointManifest(Record):
    """step: optimizer steps done. provenance: what the state was made from, by hash; another one is another training.

    circumstances: what may differ without changing what is learnt, but not bit for bit: packed or padded, processes, versions.
    """

    step: int
    state_sha256: str
    provenance: dict[str, Any]
    circumstances: dict[str, Any]


def write_checkpoint(
    folder: Path,
    *,
    step: int,
    state: Mapping[str, Any],
    provenance: Mapping[str, Any],
    circumstances: Mapping[str, Any],
) -> None:
    """state: tensors and plain values only."""
    path = folder / f"step-{step:08d}"
    aside = path.with_name(f".{path.name}.tmp")
    for left in (aside, path):  # of a write that was killed; of a damaged one that training went back behind
        if left.exists():
            shutil.rmtree(left)
    aside.mkdir(parents=True)
    torch.save(dict(state), aside / STATE)
    manifest = CheckpointManifest(
        step=step,
        state_sha256=sha256_file(aside / STATE),
        provenance=dict(provenance),
        circumstances=dict(circumstances),
    )
    write_json(aside / MANIFEST, manifest)
    sync_tree(aside)
    os.rename(aside, path)
    sync_directory(folder)
    for old in _all(folder)[:-KEPT]:
        shutil.rmtree(old)


def read_newest_checkpoint(
    folder: Path, *, stage: str, provenance: Mapping[str, Any], circumstances: Mapping[str, Any]
) -> tuple[int, dict[str, Any]] | None:
    """(step, state on the CPU) of the newest one that verifies, or None if there are none.

    Says, in lines of `stage`, which damaged ones are passed over and which circumstances are others. Raises CorruptArtifactError if none of those there are verifies.
    """
    problems: list[str] = []
    for path in reversed(_all(folder)):
        try:
            manifest = _verified(path, provenance)
            state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
        except CorruptArtifactError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            say(f"{stage}: {problem}; going back to the one of step {manifest.step}")
        for name in _different(manifest.circumstances, circumstances):
            was, now = manifest.circumstances.get(name), circumstances.get(name)
            say(f"{stage}: {name} was {was} when the checkpoint was written and is {now}: the end is the same, but not bit for bit")
        return manifest.step, state
    if problems:
        raise CorruptArtifactError(
            f"no checkpoint can be used: {'; '.join(problems)}. Remove {folder} and run the same command again; training begins anew."
        )
    return None


def rows_until(path: Path, *, step: int) -> list[dict[str, Any]]:
    """Rows of a journal up to a step; those after it, which will be written again, are taken out of the file."""
    with Journal(path) as journal:
        rows = [row for row in journal.rows if row["step"] <= step]
    write_jsonl(path, rows)
    return rows


def _verified(path: Path, provenance: Mapping[str, Any]) -> CheckpointManifest:
    """Raises CorruptArtifactError with half a sentence."""
    try:
        manifest = CheckpointManifest.model_validate_json((path / MANIFEST).read_bytes())
        sha256 = sha256_file(path / STATE)
    except (OSError, ValidationError) as error:
        raise CorruptArtifactError(f"the checkpoint {path} is damaged ({type(error).__name__})") from error
    if sha256 != manifest.state_sha256:
        raise CorruptArtifactError(f"the checkpoint {path} is damaged (its {STATE} has another sha256 than recorded)")
    if different := _different(manifest.provenance, provenance):
        raise CorruptArtifactError(f"the checkpoint {path} was made from other inputs ({', '.join(different)})")
    return manifest


def _different(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    plain = json.loads(json.dumps(dict(now)))
    return sorted(name for name in {*recorded, *plain} if recorded.get(name) != plain.get(name))


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))
