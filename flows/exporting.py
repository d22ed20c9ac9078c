"""Shipping: a blessed policy as an adapter or a merged model, or the pairs it was trained on, with card, licence and a manifest.

Only what was blessed is exported. `--force` lets a person export the rest: it is then said in the card, in `export.json`, and in `exports.jsonl` of
the run. An export is made aside and renamed: there is a whole one or none.

`exports.jsonl` has a row before an export can be seen, {"event": "begun", "out", "export_sha256", …}, and one after: `done`, or `failed` with the reason.
Where only `begun` is there, the process was killed between the two: `out` holds an `export.json` of that hash, or nothing was published.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dpo_loop.artifacts import now, package_versions, read_manifest, sha256_file, verify
from dpo_loop.errors import CorruptArtifactError, InputError
from dpo_loop.exchange import read_pairs
from dpo_loop.files import hold, sync_directory, sync_tree, write_json, write_text
from dpo_loop.journal import Journal
from dpo_loop.layout import RunDir
from dpo_loop.policies import ADAPTER_ORIGIN, adapter_sha256, describe_policy
from dpo_loop.reporting.model_card import What
from dpo_loop.types import GateState, HumanDecision, PolicyRef, Record
from flows.card import base_of, card, hub_id_of, licence_of
from flows.pair_formats import PairFormat, write_pairs
from flows.shipments import Force, Shipment, gate_of, pairs_to_ship, policy_to_ship
from flows.steps import read_run_config

EXPORT = "export.json"
CARD = "README.md"


class ExportedPolicy(Record):
    key: str
    base: str
    """Hub id, or name of its directory."""
    fine_tuned: bool = False
    """Whether base_sha256 is not of `base` but of the model that the run made from it by SFT."""
    base_sha256: str
    revision: str | None
    adapter_sha256: str | None


class ExportManifest(Record):
    """`export.json`, written last. files: relative path → sha256 of all others."""

    what: What
    format: PairFormat | None
    run_id: str
    rounds: tuple[int, ...]
    """Of a policy its round; of pairs all rounds that they are from."""
    policy: ExportedPolicy | None
    blessed_at: str | None
    gate_state: GateState | None
    report_sha256: str | None
    decision: HumanDecision | None
    forced: Force | None
    licence: str
    figures: dict[str, Any]
    """How a merge was checked, or how many pairs there are."""
    files: dict[str, str]
    versions: dict[str, str]
    exported_at: str


def export(
    run: RunDir,
    out: Path,
    *,
    what: What,
    round_number: int | None = None,
    pair_format: PairFormat | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    licence: str | None = None,
    force: Force | None = None,
    wait_s: float = 5.0,
) -> ExportManifest:
    """Make `out`, which is empty or does not exist. round_number None: the current policy, or the pairs of all promoted rounds.

    Raises InputError for what is not blessed and for an `out` that is in use, PolicyError for a merge that is not what it should be,
    CorruptArtifactError for files that changed since they were recorded, BusyError while another export of the run is made.
    """
    out = out.absolute()
    check_free(out, run)
    shipped = pairs_to_ship(run, round_number, force) if what == "pairs" else policy_to_ship(run, round_number, force)
    forced = force if shipped.blessing is None else None
    owed = licence_of(run, shipped.policy, licence)
    with hold(run.export_lock, wait_s=wait_s, what=f"an export of {run.path}"), _aside(out, run) as work:
        match what:
            case "pairs":
                figures = _write_pairs(run, work, shipped, pair_format or "trl")
            case "adapter":
                figures = _copy_adapter(work, shipped.policy)
            case "merged":
                figures = _merge(work, shipped.policy, dtype)
        for path in owed.files:
            shutil.copyfile(path, work / path.name)
        text = card(
            run,
            shipped.round,
            shipped.policy,
            what=what,
            licence=owed.name,
            forced=None if forced is None else forced.model_dump(),
            rounds_of_pairs=shipped.rounds_of_pairs,
            figures=figures,
        )
        write_text(work / CARD, text)
        manifest = _manifest(run, work, shipped, what, pair_format or "trl", owed.name, figures, forced)
        write_json(work / EXPORT, manifest)
        sync_tree(work)
        _publish(run, work, out, manifest)
    return manifest


def check_free(out: Path, run: RunDir) -> None:
    """Raises InputError for a place that cannot become a directory of its own, or that is the run's."""
    if os.path.islink(out):
        raise InputError(f"--out: {out} is a link; give a directory itself, which is empty or does not exist. Nothing was written.")
    if Path(os.path.realpath(out)).is_relative_to(run.path.resolve()):
        raise InputError(f"--out: {out} is inside the run, whose files stay as they were made; give a place outside {run.path}")
    try:
        if out.is_dir() and not any(out.iterdir()):
            return
        if out.exists():
            raise InputError(f"--out: {out} is in use; give a directory that is empty or does not exist. Nothing was overwritten.")
    except OSError as error:
        raise InputError(f"--out: {out} cannot be used: {error.strerror}") from error
    if not out.parent.is_dir():
        raise InputError(f"--out: {out.parent} does not exist; make it first")


@contextmanager
def _aside(out: Path, run: RunDir) -> Iterator[Path]:
    """A hidden directory beside `out`; gone again unless it was renamed, and cleared of what a crash left."""
    work = out.parent / f".{out.name}.{read_run_config(run).run_id}.work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
    except OSError as error:
        told = "is in the way; remove it" if os.path.lexists(work) else f"cannot be made: {error.strerror}"
        raise InputError(f"--out: {work}, where an export is made before it is renamed, {told}. Nothing was written.") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(run: RunDir, work: Path, out: Path, manifest: ExportManifest) -> None:
    known = {"out": str(out), "export_sha256": sha256_file(work / EXPORT)}
    with _journal_of(run) as journal:
        journal.append([{"event": "begun", **known, **manifest.model_dump(mode="json", exclude={"files", "versions", "figures"})}])
        try:
            os.rename(work, out)
        except OSError as error:
            journal.append([{"event": "failed", **known, "why": error.strerror, "at": now()}])
            raise InputError(
                f"--out: {out} could not be made: {error.strerror}; it was free when the export began. Nothing was exported, and {run.exports} says so."
            ) from error
        sync_directory(out.parent)
        journal.append([{"event": "done", **known, "at": now()}])


def _journal_of(run: RunDir) -> Journal:
    try:
        return Journal(run.exports)
    except ValueError as error:
        raise CorruptArtifactError(f"{error}. Every export of the run is written down there: put it back from a copy.") from error


# ------------------------------------------------------------------------------------------------------ what it is made of


def _write_pairs(run: RunDir, work: Path, shipped: Shipment, pair_format: PairFormat) -> dict[str, Any]:
    pairs = []
    for number in shipped.rounds_of_pairs:
        stage = run.round(number).stage("pair")
        manifest = read_manifest(stage)
        assert manifest is not None
        verify(stage, manifest)
        pairs += [(number, pair) for pair in read_pairs(stage)]
    write_pairs(work, pair_format, pairs)
    return {"num_pairs": len(pairs)}


def _copy_adapter(work: Path, policy: PolicyRef) -> dict[str, Any]:
    """Weights byte by byte; of the config only the name of the base changes: a hub id, or where the base is on this machine."""
    if policy.adapter is None:
        raise InputError(f"this policy has no adapter: it is the model at {policy.base}. Export it with --what merged.")
    source = Path(policy.adapter)
    _check_adapter(source, policy)
    for name in ("adapter_model.safetensors", "adapter_config.json", ADAPTER_ORIGIN):
        if (source / name).is_file():
            shutil.copyfile(source / name, work / name)
    _check_adapter(work, policy)
    config = json.loads((work / "adapter_config.json").read_bytes())
    hub_id = hub_id_of(policy.base)
    known = {"base_model_name_or_path": hub_id, "revision": policy.revision} if hub_id else {"base_model_name_or_path": policy.base}
    write_json(work / "adapter_config.json", config | known)
    return {}


def _check_adapter(adapter: Path, policy: PolicyRef) -> None:
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (adapter / name).is_file()]
    found = None if missing else adapter_sha256(adapter)
    if found != policy.adapter_sha256:
        told = f"{missing[0]} is missing" if missing else f"sha256 {str(found)[:12]}… instead of {str(policy.adapter_sha256)[:12]}…"
        raise CorruptArtifactError(f"the adapter at {adapter} is not the one that was recorded: {told}. Put it back from a copy.")


def _merge(work: Path, policy: PolicyRef, dtype: Literal["float32", "bfloat16"]) -> dict[str, Any]:
    found = describe_policy(
        Path(policy.base), revision=policy.revision, adapter=None if policy.adapter is None else Path(policy.adapter)
    )
    if found.key != policy.key:
        raise CorruptArtifactError(
            f"the policy at {policy.adapter or policy.base} has changed since it was recorded: key {found.key}, recorded {policy.key}. Put "
            "its files back from a copy."
        )
    from dpo_loop.training.merge import merge

    return merge(policy, work, dtype=dtype).model_dump()


def _manifest(
    run: RunDir,
    work: Path,
    shipped: Shipment,
    what: What,
    pair_format: PairFormat,
    licence: str,
    figures: dict[str, Any],
    forced: Force | None,
) -> ExportManifest:
    config, blessing, policy = read_run_config(run), shipped.blessing, shipped.policy
    gate, base = gate_of(run, shipped.round), base_of(config, policy)
    return ExportManifest(
        what=what,
        format=pair_format if what == "pairs" else None,
        run_id=config.run_id,
        rounds=shipped.rounds_of_pairs or (shipped.round,),
        policy=ExportedPolicy(
            key=policy.key,
            base=base.name,
            fine_tuned=base.is_fine_tuned,
            **policy.model_dump(include={"base_sha256", "revision", "adapter_sha256"}),
        ),
        blessed_at=blessing and blessing.blessed_at,
        gate_state=gate and gate.state,
        report_sha256=sha256_file(run.round(shipped.round).gate_report) if gate else None,
        decision=blessing and blessing.decision,
        forced=forced,
        licence=licence,
        figures=figures,
        files={path.relative_to(work).as_posix(): sha256_file(path) for path in sorted(work.rglob("*")) if path.is_file()},
        versions=package_versions(),
        exported_at=now(),
    )
