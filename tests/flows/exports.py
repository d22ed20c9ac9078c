"""A run from which something can be exported, made of real weights: what the export tests share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dpo_loop.artifacts import Stage, materialize, sha256_file
from dpo_loop.errors import InputError
from dpo_loop.exchange import CANARY, PAIRS, read_gate_report
from dpo_loop.files import read_json, write_json
from dpo_loop.layout import RunDir
from dpo_loop.policies import describe_policy, read_policy, write_blessing, write_policy
from dpo_loop.types import Blessing, GateState, Message, PolicyRef, PreferencePair, StageOutcome, Tally
from flows.approval import decide
from flows.exporting import EXPORT, ExportManifest, export
from flows.rounds import adopt_config, begin_round, finish_round
from flows.shipments import Force
from tests.builders import build_adapter, build_model
from tests.flows.runs import gate_report, publish, small_config

FORCE = Force(reviewer="ann", reason="the red team needs it", at="2026-01-02")


def publish_made(directory: Path, policy: PolicyRef, adapter: Path | None) -> None:
    """A stage that made a policy: the adapter lies in it, and the canary that its training left."""
    from dpo_loop.policies import adapter_sha256
    from dpo_loop.training.canary import everyday_sequences, write_canary
    from dpo_loop.training.models import build_accelerator, load_policy

    def stage(out: Path, *, seed: PolicyRef) -> StageOutcome:
        made = seed
        if adapter is not None:
            shutil.copytree(adapter, out / "adapter")
            made = seed.model_copy(update={"adapter": str(out / "adapter"), "adapter_sha256": adapter_sha256(out / "adapter")})
        accelerator = build_accelerator("float32")
        write_canary(
            out / CANARY,
            load_policy(made, accelerator=accelerator),
            everyday_sequences(AutoTokenizer.from_pretrained(made.base)),
            base_sha256=made.base_sha256,
            adapter_sha256=made.adapter_sha256,
            accelerator=accelerator,
        )
        write_policy(out, made.model_copy(update={"canary": str(out / CANARY)}))
        return StageOutcome()

    materialize(Stage(directory.name, 1, stage), directory, seed=policy)


def publish_sft(directory: Path, base: Path) -> None:
    """As SFT of all weights leaves it: a model of the run's own, here with the weights that it had."""

    def stage(out: Path, *, base: Path) -> StageOutcome:
        shutil.copytree(base, out / "model", ignore=shutil.ignore_patterns("LICENSE", "README.md"))
        write_policy(out, describe_policy(out / "model"))
        figures = {"kind": "sft", "steps": 30, "first_loss": 2.5, "last_loss": 0.75}
        return StageOutcome(tallies=(Tally(of="demonstrations", total=900, parts={"trained": 900}),), metrics=figures)

    materialize(Stage(directory.name, 1, stage), directory, base=base)


def pair(number: int, index: int) -> PreferencePair:
    turns = (Message(role="system", content="Be brief."), Message(role="user", content=f"Say {number}-{index} “å”"))
    return PreferencePair(
        prompt=turns[index % 2 :],
        chosen=(Message(role="assistant", content="two words"),),
        rejected=(Message(role="assistant", content="line\nbreak\t{}"),),
        prompt_id=f"p{number}-{index}",
        chosen_id="c",
        rejected_id="r",
        prompt_token_ids=(5, 6, 7),
        chosen_token_ids=(8, 0),
        rejected_token_ids=(9, 10, 0),
        margin=0.75,
        ballot_keys=(),
    )


def play(run: RunDir, number: int, adapter: Path, state: GateState, *, ends: bool = True) -> None:
    begin_round(run, number)
    here = run.round(number)
    pairs = "".join(pair(number, index).model_dump_json() + "\n" for index in range(3 + number))
    publish(here.stage("pair"), {PAIRS: pairs})
    publish_made(here.stage("train"), read_policy(run.round(0).stage("seed")), adapter)
    before = run.round(number - 1).gate_report
    known = {
        "candidate": read_policy(here.stage("train")),
        "previous_report_sha256": sha256_file(before) if before.is_file() else None,
    }
    report = gate_report(number, state).model_copy(update=known)
    publish(here.stage("gate"), {"gate_report.json": report.model_dump_json()})
    publish(here.stage("report"), {"report.html": "<html>"})
    if ends:
        finish_round(run, number)


def build_base(folder: Path) -> Path:
    """A base with a licence, and a card that names it."""
    model = build_model(folder / "tiny-llama")
    (model / "LICENSE").write_text("Permission is hereby granted")
    (model / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# Tiny\n")
    return model


def play_rounds(root: Path, base: Path) -> RunDir:
    """Round 1 was promoted, round 2 failed, round 3 was promoted by a person, round 4 waits for one."""
    run = RunDir(root / "run")
    adopt_config(run, small_config(run.path, start={"kind": "model", "model": str(base)}, world=None))
    begin_round(run, 0)
    publish_made(run.round(0).stage("seed"), describe_policy(base), None)
    finish_round(run, 0)
    adapters = [build_adapter(root / f"adapter-{seed}", base, seed=seed, rank=4, scale=0.05) for seed in (1, 2, 3, 4)]
    play(run, 1, adapters[0], GateState.PASS)
    play(run, 2, adapters[1], GateState.FAIL)
    play(run, 3, adapters[2], GateState.NEEDS_REVIEW, ends=False)
    decide(run, 3, "approve", reviewer="bob", reason="read the samples")
    finish_round(run, 3)
    play(run, 4, adapters[3], GateState.INCONCLUSIVE, ends=False)
    return run


def play_sft(root: Path, base: Path, *, model: str) -> RunDir:
    """Round 1 was promoted, and stands on the model that round 0 made by SFT from `model`."""
    run = RunDir(root / "run")
    start = {"kind": "sft", "model": model, "demonstrations": "d.jsonl", "sft": {"optimizer": {"lr": 0.001}}}
    adopt_config(run, small_config(run.path, start=start, world=None))
    begin_round(run, 0)
    publish_sft(run.round(0).stage("seed"), base)
    finish_round(run, 0)
    made = Path(read_policy(run.round(0).stage("seed")).base)
    play(run, 1, build_adapter(root / "adapter", made, seed=1, rank=4, scale=0.05), GateState.PASS)
    return run


def bless(run: RunDir, number: int, **changes: Any) -> Path:
    """Writes the blessing that a promotion of the round would, with changes; and makes the round's end agree."""
    here = run.round(number)
    policy = read_policy(here.stage("train"))
    values = {"round": number, "policy": policy, "gate_state": read_gate_report(here.stage("gate")).state}
    values |= {"report_sha256": sha256_file(here.gate_report), "decision": None, "blessed_at": "2026-01-02"}
    write_blessing(here.blessing, Blessing.model_validate(values | changes), run=run.path)
    if here.manifest.is_file():
        write_json(here.manifest, json.loads(here.manifest.read_text()) | {"promoted": True})
    return here.blessing


def manifest_of(out: Path) -> ExportManifest:
    """After comparing every file with its hash."""
    manifest = read_json(out / EXPORT, ExportManifest)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {*manifest.files, EXPORT}
    assert all(sha256_file(out / name) == sha256 for name, sha256 in manifest.files.items())
    return manifest


def recorded(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.exports).read_text().splitlines()]


def read_back(out: Path, cache: Path) -> list[dict[str, Any]]:
    from datasets import load_dataset

    return [dict(row) for row in load_dataset(str(out), split="train", cache_dir=str(cache))]


def refused(run: RunDir, out: Path, match: str, error: type[Exception] = InputError, **words: Any) -> None:
    """Nothing is there afterwards, neither `out` nor something half-done beside it, and nothing is recorded."""
    parent = out.parent.resolve()
    before = {path.name for path in parent.iterdir()} | ({".export.lock"} if parent == run.path else set())
    with pytest.raises(error, match=match):
        export(run, out, **words)
    assert {path.name for path in parent.iterdir()} <= before
    assert not (run.exports).exists() or recorded(run) == []
