"""The model card of a round, and the licence that goes with it, gathered from a run's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_loop.artifacts import read_manifest, sha256_file
from dpo_loop.config import Settings, SftStart
from dpo_loop.errors import CorruptArtifactError
from dpo_loop.exchange import read_prompt_sets
from dpo_loop.layout import RunDir
from dpo_loop.policies import base_name
from dpo_loop.reporting.model_card import UNKNOWN_LICENCE, Base, CardFacts, Sft, TrainedRound, What, render_card
from dpo_loop.types import PolicyRef, PromptSet, RoundSummary
from flows.approval import decision_of
from flows.config import RunConfig
from flows.inputs import candidate_of
from flows.paths import WORLD_PREFIX, is_hub_id
from flows.shipments import blessing_of, check_has_policy, gate_of
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
    """figures: of the export itself. Raises CorruptArtifactError where a gate's report, a blessing or a round's end is not what it was."""
    config, here = read_run_config(run), run.round(round_number)
    gate = gate_of(run, round_number)
    if what != "pairs" and gate is not None and gate.candidate is not None and gate.candidate.key != policy.key:
        raise CorruptArtifactError(
            f"round {round_number} of {run.path} made policy {policy.key}, but its gate graded {gate.candidate.key}. Put back from a copy what was changed."
        )
    numbers = range(round_number + 1)
    return render_card(
        CardFacts(
            run_id=config.run_id,
            round=round_number,
            what=what,
            base=base_of(config, policy),
            policy=policy,
            licence=licence,
            blessed=blessing_of(run, round_number) is not None,
            training=config.training,
            judge=_judge(config.judge),
            safety_judge=_named(config.grading.safety),
            sft=_sft(run, config),
            lineage=tuple(_row(run, number) for number in numbers),
            trained=tuple(row for number in numbers if (row := _trained(run, number)) is not None),
            gate=gate,
            # Looks that may each decide share alpha, as in the stage `gate`.
            alpha=config.gate.alpha / (2 if config.prompts.eval_reserve > 0 else 1),
            report_sha256=None if gate is None else sha256_file(here.gate_report),
            decision=decision_of(run, round_number),
            forced=forced,
            rounds_of_pairs=rounds_of_pairs,
            pool=_pool(run, config),
            figures=figures or {},
        )
    )


def base_of(config: RunConfig, policy: PolicyRef) -> Base:
    """What a policy stands on, as it is known elsewhere. SFT of all weights makes a model that nobody else has; SFT of an adapter leaves the base as it is."""
    start = config.start
    fine_tuned = isinstance(start, SftStart) and start.sft.lora is None
    hub_id = hub_id_of(start.model) or (None if fine_tuned else hub_id_of(policy.base))
    return Base(name=hub_id or base_name(start.model.removeprefix(WORLD_PREFIX)), hub_id=hub_id, is_fine_tuned=fine_tuned)


def hub_id_of(model: str) -> str | None:
    """Of a hub id, and of its snapshot in the cache; None for any other directory."""
    if any(part.startswith("models--") for part in Path(model).parts):
        return base_name(model)
    return model if is_hub_id(model) else None


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


def _row(run: RunDir, number: int) -> RoundSummary:
    """Of the lineage, in which a gate is quoted too."""
    row, gate = row_of(run, number), gate_of(run, number)
    if row.gate is not (gate and gate.state):
        raise CorruptArtifactError(
            f"{run.round(number).manifest} says that the gate of round {number} said {row.gate and row.gate.value}, but the gate's own report says "
            f"{gate and gate.state.value}. Put it back from a copy."
        )
    return row


def _sft(run: RunDir, config: RunConfig) -> Sft | None:
    made = read_manifest(run.round(0).stage("seed"))
    if not isinstance(config.start, SftStart) or made is None:
        return None
    num = next((tally.parts.get("trained") for tally in made.outcome.tallies if tally.of == "demonstrations"), None)
    return Sft(config.start.sft, num, made.outcome.metrics)


def _pool(run: RunDir, config: RunConfig) -> PromptSet:
    """Where the prompts that the run trains on come from: the first set of the evaluation is what was held out of them."""
    evalset, pool = run.round(0).stage("evalset"), config.prompts.pool
    known = read_prompt_sets(evalset) if read_manifest(evalset) else ()
    return known[0] if known else PromptSet(source=Path(pool.path.removeprefix(WORLD_PREFIX)).name, num_prompts=0)


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
