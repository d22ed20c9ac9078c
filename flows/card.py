"""The model card of a round, and the licence that goes with it, gathered from a run's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_loop.artifacts import read_manifest, sha256_file
from dpo_loop.config import Settings
from dpo_loop.errors import InputError
from dpo_loop.exchange import read_gate_report
from dpo_loop.layout import RunDir
from dpo_loop.policies import base_name
from dpo_loop.reporting.model_card import UNKNOWN_LICENCE, CardFacts, TrainedRound, What, render_card
from dpo_loop.types import PolicyRef
from flows.approval import decision_of
from flows.config import RunConfig
from flows.inputs import candidate_of, is_published
from flows.paths import WORLD_PREFIX, is_hub_id
from flows.rounds import RoundState, state_of
from flows.steps import read_run_config
from flows.summary import row_of
from judges.config import Judge, members_of

_LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_BASE_CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Licence:
    """Of the base. files: its texts, to be shipped too."""

    name: str
    files: tuple[Path, ...]


def card_of(run: RunDir, round_number: int, *, licence: str | None = None) -> str:
    """The card of a round that made a policy. Raises InputError for one that did not."""
    check_has_policy(run, round_number)
    policy = candidate_of(run, round_number)
    what: What = "merged" if policy.adapter is None else "adapter"
    return card(run, round_number, policy, what=what, licence=licence_of(run, policy, licence).name)


def check_has_policy(run: RunDir, round_number: int) -> None:
    if state_of(run, round_number) is RoundState.NEW:
        raise InputError(f"{run.path} has no round {round_number}; it has rounds 0 to {len(run.rounds()) - 1}")
    stage = "seed" if round_number == 0 else "train"
    if not is_published(run, round_number, stage):
        raise InputError(f"round {round_number} of {run.path} has made no policy: its stage {stage} is not published")


def card(
    run: RunDir,
    round_number: int,
    policy: PolicyRef,
    *,
    what: What,
    licence: str,
    forced: Mapping[str, str] | None = None,
    rounds_of_pairs: tuple[int, ...] = (),
    figures: Mapping[str, Any] | None = None,
) -> str:
    """figures: of the export itself."""
    config, here = read_run_config(run), run.round(round_number)
    gate_dir = here.stage("gate")
    gate = read_gate_report(gate_dir) if read_manifest(gate_dir) else None
    numbers = range(round_number + 1)
    return render_card(
        CardFacts(
            run_id=config.run_id,
            round=round_number,
            what=what,
            base=base_label(config, policy),
            policy=policy,
            licence=licence,
            blessed=here.blessing.is_file(),
            training=config.training,
            judge=_judge(config.judge),
            safety_judge=_named(config.grading.safety),
            lineage=tuple(row_of(run, number) for number in numbers),
            trained=tuple(row for number in numbers if (row := _trained(run, number)) is not None),
            gate=gate,
            report_sha256=None if gate is None else sha256_file(here.gate_report),
            decision=decision_of(run, round_number),
            forced=forced,
            rounds_of_pairs=rounds_of_pairs,
            figures=figures or {},
        )
    )


def base_label(config: RunConfig, policy: PolicyRef) -> str:
    """How the base is known elsewhere: its hub id, or that of the model it was fine-tuned from; else the name of its directory."""
    name = base_name(policy.base)
    return config.start.model if "/" not in name and is_hub_id(config.start.model) else name


def licence_of(run: RunDir, policy: PolicyRef, given: str | None) -> Licence:
    """given: what the user says it is; else what the base's own card says."""
    folders = [folder for folder in (Path(policy.base), _start_model(run)) if folder is not None and folder.is_dir()]
    files: dict[str, Path] = {}
    for folder in reversed(folders):  # the base's own text wins over that of the model it was made from
        files |= {path.name: path for pattern in _LICENCE_FILES for path in sorted(folder.glob(pattern)) if path.is_file()}
    said = (given, *(_licence_in_card(folder / _BASE_CARD) for folder in folders))
    return Licence(next((name for name in said if name), UNKNOWN_LICENCE), tuple(files.values()))


def _start_model(run: RunDir) -> Path | None:
    """The directory of the model that the run started from, None for a model of the hub."""
    model = read_run_config(run).start.model
    if model.startswith(WORLD_PREFIX):
        return run.round(0).stage("world") / model.removeprefix(WORLD_PREFIX)
    return None if is_hub_id(model) else Path(model)


def _licence_in_card(path: Path) -> str | None:
    """`license` in the YAML that opens a model card; None where there is none, or what is there is no YAML."""
    if not path.is_file():
        return None
    opening, _, rest = path.read_text(encoding="utf-8", errors="replace").partition("---\n")
    if opening.strip() or "\n---" not in rest:
        return None
    try:
        metadata = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return None
    found = metadata.get("license") if isinstance(metadata, dict) else None
    return found if isinstance(found, str) else None


def _trained(run: RunDir, round_number: int) -> TrainedRound | None:
    train = read_manifest(run.round(round_number).stage("train"))
    if train is None:
        return None
    num_pairs = next((tally.parts.get("trained") for tally in train.outcome.tallies if tally.of == "pairs"), None)
    return TrainedRound(round_number, num_pairs, train.outcome.metrics)


def _judge(judge: Judge) -> str:
    return "; ".join(_named(member) for member in members_of(judge))


def _named(judge: Settings) -> str:
    """Its kind, and the model or the function that it is."""
    model = getattr(judge, "model", None) or getattr(judge, "function", None)
    kind = str(getattr(judge, "kind", ""))
    inner = getattr(judge, "judge", None)
    return " ".join(filter(None, (kind, model, _named(inner) if isinstance(inner, Settings) else "")))
