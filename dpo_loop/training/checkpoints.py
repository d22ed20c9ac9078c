"""Checkpoints inside a stage's scratch: written aside, fsynced, renamed; the older ones pruned.

A scratch belongs to one stage key, so a checkpoint found in it was made from the same inputs and the same config.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from dpo_loop.errors import CorruptArtifactError
from dpo_loop.files import sync_directory

KEPT = 2
"""The newest, and one before it in case the disk damaged the newest."""


def write_checkpoint(folder: Path, *, step: int, state: dict[str, Any]) -> None:
    """state: tensors and plain values only, so that loading runs no code."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, step)
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_directory(folder)
    for old in _all(folder)[:-KEPT]:
        old.unlink()


def read_newest_checkpoint(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state) on the CPU, or None. Raises CorruptArtifactError if the file cannot be read."""
    found = _all(folder)
    if not found:
        return None
    path = found[-1]
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler and zip reader meet
        raise CorruptArtifactError(
            f"{path} is damaged ({type(error).__name__} while reading it). Remove it and run the same command again; training resumes from an earlier step."
        ) from error
    return int(path.stem.removeprefix("step-")), state


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))
