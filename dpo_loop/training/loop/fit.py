"""The one training loop, for SFT and preferences: optimizer steps, looks at held-out rows, alarms, checkpoints, exact resume.

On a CPU a run that was killed at any point and started again ends with the same bits: the order is a pure function of the seed,
dropout is drawn from (seed, step, process), and a checkpoint holds all that a finished step leaves behind. With several processes
each runs this function; they decide by the same figures, and only the main one writes.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpo_loop.artifacts import package_versions
from dpo_loop.config import AlarmsConfig, HeldOutConfig, OptimizerConfig
from dpo_loop.errors import InputError, TrainingDivergedError
from dpo_loop.exchange import ALARMS, METRICS
from dpo_loop.journal import Journal
from dpo_loop.progress import say
from dpo_loop.training.loop.accumulation import Accumulator, Objective, OutOfMemoryError, does_not_fit
from dpo_loop.training.loop.alarms import Alarm, alarms_at
from dpo_loop.training.loop.batches import Cut, Spread, optimizer_steps
from dpo_loop.training.loop.checkpoints import read_newest_checkpoint, rows_until, write_checkpoint
from dpo_loop.training.loop.held_out import BestLook, put
from dpo_loop.training.loop.optimizer import build_optimizer, lr_at
from dpo_loop.training.loop.step_lines import StepLines
from dpo_loop.training.loop.trackers import send
from dpo_loop.training.processes import Processes
from dpo_loop.types import content_id

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True)
class Plan:
    """stage and label open the progress lines, `seed: sft step 3/9`. num_tokens: that row i puts through the model."""

    stage: str
    label: str
    num_tokens: Sequence[int]
    cut: Cut
    epochs: int
    per_step: int
    micro_batch_tokens: int
    checkpoint_every_steps: int
    optimizer: OptimizerConfig
    seed: int
    estimates: Spread | None = None
    """Of the sequences that the objective's estimates are taken of, where they are others than the rows'."""
    held_out: Sequence[int] = ()
    """Rows that are never trained on."""
    held_out_config: HeldOutConfig | None = None
    """When to look at them; needed if there are any."""
    alarms: AlarmsConfig | None = None
    expected_memory: str = ""
    """What training was expected to need, for the message when it does not fit."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What training is made from, by hash, JSON: a checkpoint made from something else is not resumed from."""
    circumstances: Mapping[str, Any] = field(default_factory=dict)
    """What is recorded in a checkpoint beside it, and may differ when training goes on."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """rows: the metrics of every step. stopped_early_at: the step after which held-out pairs ended training, None if they did not.

    weights_of_step: the step whose weights the parameters now have. micro_batch_tokens: those of the last step, halved where memory ran out.
    """

    rows: list[dict[str, Any]]
    alarms: list[Alarm]
    stopped_early_at: int | None
    weights_of_step: int
    micro_batch_tokens: int


def seed_of(seed: int, step: int, process: int) -> int:
    """Of what is drawn in a step: 0 <= result < 2**63, as torch takes it, for every seed of a config."""
    return (seed * 1_000_003 + step + 15_485_863 * process) % 2**63


def fit(
    objective: Objective, *, plan: Plan, model: Any, parameters: Mapping[str, torch.nn.Parameter], accelerator: Any, keep: Path
) -> Fitted:
    """Train `parameters` of `model` in place.

    keep: the scratch directory of the stage; checkpoints, metrics.jsonl and alarms.jsonl live there.
    Raises TrainingDivergedError at the first loss or gradient that is not finite, before it touches a weight, and at an alarm that stops;
    InputError if a micro-batch of half the planned tokens does not fit into memory either.
    """
    loop = _Loop(objective, plan, model, parameters, accelerator, keep)
    done = loop.resume()
    with ExitStack() as files:
        if loop.processes.is_main:
            loop.journals = {name: files.enter_context(Journal(keep / name)) for name in (METRICS, ALARMS)}
        return loop.run(done)


class _Loop:
    def __init__(
        self,
        objective: Objective,
        plan: Plan,
        model: Any,
        parameters: Mapping[str, torch.nn.Parameter],
        accelerator: Any,
        keep: Path,
    ) -> None:
        self.objective, self.plan, self.accelerator, self.keep = objective, plan, accelerator, keep
        self.parameters = parameters
        self.processes = Processes(accelerator)
        self.accumulator = Accumulator(
            objective,
            cut=plan.cut,
            num_tokens=plan.num_tokens,
            estimates=plan.estimates,
            accelerator=accelerator,
            processes=self.processes,
            model=model,
        )
        held_out = set(plan.held_out)
        trained = [row for row in range(len(plan.num_tokens)) if row not in held_out]
        order = optimizer_steps(len(trained), epochs=plan.epochs, per_step=plan.per_step, seed=plan.seed)
        self.steps = [[trained[index] for index in step] for step in order]
        self.optimizer = build_optimizer(parameters.values(), plan.optimizer)
        self.best = BestLook(plan.held_out_config.patience if plan.held_out_config else None)
        self.max_tokens, self.halved = plan.micro_batch_tokens, False
        self.rows: list[dict[str, Any]] = []
        self.alarms: list[Alarm] = []
        self.journals: dict[str, Journal] = {}
        self.opening = f"{plan.stage}: {plan.label}"
        self.provenance = {**plan.provenance, "order": content_id(self.steps), "optimizer": plan.optimizer.model_dump()}
        self.circumstances = {
            **plan.circumstances,
            "micro_batch_tokens": plan.micro_batch_tokens,
            "num_processes": self.processes.num,
            "num_threads": torch.get_num_threads(),
            "versions": package_versions(),
        }

    def resume(self) -> int:
        """Restore the newest checkpoint; returns how many steps are done. What was measured after it is measured again."""
        done, state, self.rows, self.alarms = self.processes.from_main(self._read)
        if state is not None:
            put(state["parameters"], self.parameters)
            self.optimizer.load_state_dict(state["optimizer"])
            # Halved for the rest of the run, unless somebody has set another budget since.
            if state["halved"] and state["planned_tokens"] == self.plan.micro_batch_tokens:
                self.max_tokens, self.halved = state["micro_batch_tokens"], True
            self.best.load(state["best"])
        return done

    def run(self, done: int) -> Fitted:
        """Do what is left after `done` steps."""
        if done:
            self._say(f"resumes after step {done}/{len(self.steps)}")
        lines = StepLines(self.opening, num_steps=len(self.steps), first=done)
        while done < len(self.steps) and not self.best.is_over:
            row = self._step(done)
            done += 1
            is_last = done == len(self.steps) or self.best.is_over
            self._raise_alarms(is_last=is_last)
            if done % self.plan.checkpoint_every_steps == 0:
                self._checkpoint(done)
            if self.processes.is_main:
                lines.show(row, is_last=is_last)
        stopped_early_at = done if self.best.is_over else None
        if stopped_early_at is not None:
            than = f"no lower loss than {self.best.loss:.4f}" if self.best.step else "no finite loss"
            self._say(
                f"stops early after step {done}/{len(self.steps)}: {self.best.looks_since} looks at held-out pairs in a row found {than}"
            )
        if not self.best.weights:
            return Fitted(self.rows, self.alarms, stopped_early_at, done, self.max_tokens)
        self._say(f"ends with the weights of step {self.best.step}, the best look at held-out pairs")
        self.best.restore(self.parameters)
        return Fitted(self.rows, self.alarms, stopped_early_at, self.best.step, self.max_tokens)

    def _step(self, step: int) -> dict[str, Any]:
        rows, started = self.steps[step], time.monotonic()
        lr = lr_at(step, num_steps=len(self.steps), config=self.plan.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums = self._within_memory(lambda: self._gradient(rows, step), step=step)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.plan.optimizer.max_grad_norm))
        if not (math.isfinite(sums["loss"]) and math.isfinite(grad_norm)):
            raise self._diverged(f"at step {step + 1}: loss sum {sums['loss']}, gradient norm {grad_norm}")
        figures = self.objective.metrics(sums, rows, step=step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens_per_s = sum(self.plan.num_tokens[row] for row in rows) / (time.monotonic() - started)
        row = {"step": step + 1, **figures, "grad_norm": grad_norm, "lr": lr, "tokens_per_s": round(tokens_per_s, 1)}
        if self._looks_after(step):
            row |= self._look(step)
        self.rows.append(row)
        self._append(METRICS, row)
        send(self.accelerator, {name: value for name, value in row.items() if name != "step"}, step=step + 1)
        return row

    def _gradient(self, rows: Sequence[int], step: int) -> dict[str, float]:
        torch.manual_seed(seed_of(self.plan.seed, step, self.processes.index))
        sums = self.accumulator.backward(rows, max_tokens=self.max_tokens)
        self.processes.add_gradients(self.parameters.values())
        return sums

    def _looks_after(self, step: int) -> bool:
        config = self.plan.held_out_config
        if config is None or not self.plan.held_out:
            return False
        return (step + 1) % config.every_steps == 0 or step + 1 == len(self.steps)

    def _look(self, step: int) -> dict[str, float]:
        held_out = self.plan.held_out
        sums = self._within_memory(lambda: self.accumulator.look(held_out, max_tokens=self.max_tokens))
        figures = self.objective.metrics(sums, held_out, step=step + 1)
        self.best.see(figures["loss"], step=step + 1, parameters=self.parameters)
        return {f"held_out_{name}": figures[name] for name in ("loss", "accuracy", "margin") if name in figures}

    def _within_memory(self, attempt: Callable[[], dict[str, float]], *, step: int | None = None) -> dict[str, float]:
        """Attempt it; where memory runs out, once more with half the token budget, which then holds for the rest of the run.

        step: of which the attempt is the first thing that is done, so that it can begin anew from a checkpoint of its start.
        """
        try:
            return attempt()
        except OutOfMemoryError as error:
            shortage = str(error)
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.halved or self.processes.sharded:
            raise self._too_large(shortage)
        self.max_tokens, self.halved = max(1, self.max_tokens // 2), True
        self._say(
            f"ran out of memory ({shortage}); goes on with micro-batches of {self.max_tokens} tokens, half of what was planned"
        )
        if step is not None:
            self._checkpoint(step)
        try:
            return attempt()
        except OutOfMemoryError as error:
            raise self._too_large(str(error)) from error

    def _too_large(self, shortage: str) -> InputError:
        what = f"{self.plan.label} with micro-batches of {self.max_tokens} tokens"
        return does_not_fit(what, shortage, expected=self.plan.expected_memory)

    def _raise_alarms(self, *, is_last: bool) -> None:
        if self.plan.alarms is None:
            return
        before = {(alarm.name, alarm.level) for alarm in self.alarms}
        found = alarms_at(self.rows, self.plan.alarms, max_grad_norm=self.plan.optimizer.max_grad_norm, is_last=is_last)
        new = [alarm for alarm in found if (alarm.name, alarm.level) not in before]
        for alarm in new:
            self.alarms.append(alarm)
            self._append(ALARMS, alarm.model_dump())
            self._say(f"alarm, {alarm.level}: {alarm.message}")
        if stops := [alarm.message for alarm in new if alarm.level == "stop"]:
            raise self._diverged(f"past a limit that ends training. {' '.join(stops)}")

    def _read(self) -> tuple[int, dict[str, Any] | None, list[dict[str, Any]], list[Alarm]]:
        found = read_newest_checkpoint(
            self.keep / CHECKPOINTS, stage=self.plan.stage, provenance=self.provenance, circumstances=self.circumstances
        )
        done, state = found or (0, None)
        metrics, alarms = (rows_until(self.keep / name, step=done) for name in (METRICS, ALARMS))
        return done, state, metrics, [Alarm.model_validate(row) for row in alarms]

    def _checkpoint(self, done: int) -> None:
        if not self.processes.is_main:
            return
        write_checkpoint(
            self.keep / CHECKPOINTS,
            step=done,
            state={
                "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
                "optimizer": self.optimizer.state_dict(),
                "planned_tokens": self.plan.micro_batch_tokens,
                "micro_batch_tokens": self.max_tokens,
                "halved": self.halved,
                "best": self.best.state(),
            },
            provenance=self.provenance,
            circumstances=self.circumstances,
        )

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if self.processes.is_main:
            self.journals[name].append([row])

    def _say(self, text: str) -> None:
        if self.processes.is_main:
            say(f"{self.opening} {text}")

    def _diverged(self, what: str) -> TrainingDivergedError:
        row = self.rows[-1] if self.rows else {}
        last = ", ".join(f"{name} {value:.4g}" for name, value in row.items()) or "none, it was the first step"
        return TrainingDivergedError(
            f"{self.plan.label} diverged {what}. Last good step: {last}. Nothing was published; the metrics up to there are kept in "
            f"{self.keep / METRICS}. Ways out: a lower learning rate, a smaller max_grad_norm, or look at the pairs."
        )
