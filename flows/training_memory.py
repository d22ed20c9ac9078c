"""`dpo-loop estimate CONFIG`: whether one round of training fits into the memory that there is, or into that of another card."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dpo_loop.config import KtoLoss
from dpo_loop.errors import InputError
from dpo_loop.layout import RunDir
from dpo_loop.training.memory.plan import MemoryPlan, machine_bytes, plan_memory
from dpo_loop.training.prerequisites import accelerate_problems, num_processes_of
from flows.config import RunConfig
from flows.paths import WORLD_PREFIX, is_hub_id

if TYPE_CHECKING:
    from rich.table import Table

_ROWS = (
    ("weights of the base", "weights_bytes"),
    ("adapter and optimizer", "adapter_bytes"),
    ("activations", "activations_bytes"),
    ("head", "head_bytes"),
    ("Python, libraries, CUDA", "runtime_bytes"),
)


class Place(NamedTuple):
    """Where training runs. limit_bytes: of one process."""

    device: Literal["cpu", "cuda"]
    limit_bytes: int
    name: str


class Planned(NamedTuple):
    """unknown: why there is no plan."""

    place: Place
    plan: MemoryPlan | None
    unknown: str = ""


def plan_of(config: RunConfig, *, memory_gib: float | None) -> Planned:
    """memory_gib: of a card that is not here; None takes the GPU of this machine, or its memory where it has none.

    Raises PolicyError for a model that is here and cannot be read, InputError for an accelerate config that cannot be used and for a size
    that no card has.
    """
    training = config.training
    if problems := accelerate_problems(training):
        raise InputError("; ".join(problems))
    place = _place(memory_gib, num_processes=num_processes_of(training))
    base = _model_here(config)
    if isinstance(base, str):
        return Planned(place, None, base)
    longest = min(training.max_length, config.generation.engine.max_model_len)
    plan = plan_memory(
        base,
        training,
        device=place.device,
        limit_bytes=place.limit_bytes,
        longest_tokens=longest if isinstance(training.loss, KtoLoss) else 2 * longest,
    )
    return Planned(place, plan)


def told_of(planned: Planned) -> dict[str, Any]:
    about = {"device": planned.place.device, "limit_bytes": planned.place.limit_bytes, "limit_of": planned.place.name}
    return about | ({"unknown": planned.unknown} if planned.plan is None else planned.plan.model_dump())


def table_of(plan: MemoryPlan, place: Place) -> Table:
    from rich.table import Table

    table = Table(title="training of one round", title_justify="left")
    table.add_column("what", justify="left")
    table.add_column("GiB", justify="right")
    for what, name in _ROWS:
        table.add_row(what, _gib(getattr(plan, name)))
    table.add_section()
    table.add_row("peak of one process", _gib(plan.total_bytes))
    table.add_row(f"limit: {place.name}", _gib(place.limit_bytes))
    return table


def lines_of(planned: Planned) -> list[str]:
    plan = planned.plan
    if plan is None:
        return [f"training of one round: {planned.unknown}"]
    checkpointing = "with" if plan.gradient_checkpointing else "without"
    lines = [
        f"Training takes micro-batches of {plan.micro_batch_tokens:,} tokens, {checkpointing} gradient checkpointing, on the "
        f"{'GPU' if planned.place.device == 'cuda' else 'CPU'}."
    ]
    if not plan.fits:
        lines.append(
            "That will probably not fit. Ways out: a smaller training.max_length or training.micro_batch_tokens, a lower "
            "training.lora.rank, a smaller model, "
            + ("" if plan.gradient_checkpointing else "training.gradient_checkpointing: auto, ")
            + ("training.quantize_base: nf4, or a larger card." if planned.place.device == "cuda" else "or a GPU.")
        )
    return lines + [f"note: {note}." for note in plan.notes]


def _place(memory_gib: float | None, *, num_processes: int) -> Place:
    if memory_gib is not None:
        if not (memory_gib > 0 and math.isfinite(memory_gib * 2**30)):
            raise InputError(f"--memory-gib: {memory_gib:g} is no size of a card; give GiB above 0, such as 24 or 80")
        return Place("cuda", int(memory_gib * 2**30), f"a GPU of {memory_gib:g} GiB")
    if gpus := _gpus():
        name, size = min(gpus, key=lambda gpu: gpu[1])
        return Place("cuda", size, name)
    name = "this machine" if num_processes == 1 else f"this machine, shared by {num_processes} processes"
    return Place("cpu", machine_bytes() // num_processes, name)


def _gpus() -> list[tuple[str, int]]:
    """(name, bytes) of each, as the driver says, so that torch need not be imported. Empty where there are none or none is visible."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") or shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    asked = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    rows = [line.rsplit(",", 1) for line in asked.stdout.splitlines() if asked.returncode == 0]
    return [(row[0].strip(), int(row[1]) * 2**20) for row in rows if len(row) == 2 and row[1].strip().isdigit()]


def _model_here(config: RunConfig) -> Path | str:
    """The directory of the model, or why nobody knows its sizes here."""
    model, revision = config.start.model, config.start.revision
    if model.startswith(WORLD_PREFIX):
        made = RunDir(Path(config.run_dir)).round(0).stage("world") / model.removeprefix(WORLD_PREFIX)
        return made if made.is_dir() else f"{model} is made by the run itself, so its memory is not known before the first round."
    if not is_hub_id(model):
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    if isinstance(found, str):
        return Path(found).parent
    return f"{model} is not in the local Hugging Face cache, so its memory is not known; download it (hf download {model}), or give its directory."


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"
