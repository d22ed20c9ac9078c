"""Whether the gate of a config can decide at all: what would make every round INVALID is refused, what lets none pass is a warning.

A set that is not here before the run (of the hub, of a world) may have any prompt, so nothing is said where one is named that could help.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dpo_loop.config import WIN_RATES, BuiltinPool, ExternalPool, HubPool, JsonlPool, Pool, SideColumn
from dpo_loop.errors import PromptFileError
from dpo_loop.evaluation.rates import SIDE_OF_METRIC
from dpo_loop.evaluation.vetoes import EVERY
from dpo_loop.prompts.external import set_of
from dpo_loop.prompts.pool import usable_prompts
from dpo_loop.prompts.split import is_held_out, is_reserved
from dpo_loop.types import Prompt, Side
from flows.config import RunConfig
from flows.paths import WORLD_PREFIX

MOST_CATEGORIES_SHOWN = 30


@dataclass(frozen=True, slots=True)
class _Need:
    """A rule of the gate looks at prompts of one side and, a veto, of some categories. key: of the rule; what: as people call it."""

    key: str
    what: str
    side: Side
    categories: tuple[str, ...] = (EVERY,)

    @property
    def is_of_any_category(self) -> bool:
        return EVERY in self.categories

    def is_met_by(self, prompt: Prompt) -> bool:
        return prompt.side is self.side and (self.is_of_any_category or prompt.tags.get("category", "") in self.categories)


def gate_problems(config: RunConfig) -> Iterator[str]:
    for index, rule in enumerate(config.gate.checks):
        if rule.metric == "pass_rate" and config.grading.task is None:
            yield f"gate.checks.{index}.metric: pass_rate needs a task grader; set grading.task or remove the check"
        if rule.task is not None and rule.task not in (known := [task.id for task in config.capability.tasks]):
            yield f"gate.checks.{index}.task: {rule.task} is none of capability.tasks ({', '.join(known) or 'there is none'})"
    seen: set[tuple[Side, str]] = set()
    for need in _unmet(config, _needs(config), _sources(config), seen):
        yield _told(need, sorted(category for side, category in seen if side is need.side and category))


def gate_warnings(config: RunConfig) -> list[str]:
    sources = _sources(config)
    smoke = [pool for pool in sources if isinstance(pool, BuiltinPool) and pool.split == "smoke"]
    others = [pool for pool in sources if pool not in smoke]
    sides = [_Need("", "", side) for side in (Side.HARMFUL, Side.BENIGN)]
    if not smoke or len(_unmet(config, sides, others, set())) < len(sides):
        return []
    return [
        "prompts.eval_sets: harmful and benign prompts are the smoke split alone, which shows that all parts work and on which no round passes; "
        "for a run that counts write `split: core`."
    ]


def _needs(config: RunConfig) -> list[_Need]:
    needs = []
    for index, rule in enumerate(config.gate.checks):
        side = Side.TASK if rule.metric in WIN_RATES else SIDE_OF_METRIC.get(rule.metric)
        if side is not None and not (rule.metric == "pass_rate" and config.grading.task is None):
            needs.append(_Need(f"gate.checks.{index}.metric", f"{rule.metric} of check {rule.id}", side))
    for index, veto in enumerate(config.gate.vetoes):
        side = SIDE_OF_METRIC[veto.metric]
        needs.append(_Need(f"gate.vetoes.{index}.categories", f"veto {veto.id}", side, veto.categories))
    return needs


def _sources(config: RunConfig) -> list[Pool]:
    """Of evaluation prompts; the pool last, since it is large."""
    prompts = config.prompts
    return [*prompts.eval_sets, *([prompts.pool] if prompts.eval_fraction > 0 else [])]


def _unmet(config: RunConfig, needs: Iterable[_Need], sources: list[Pool], seen: set[tuple[Side, str]]) -> list[_Need]:
    """Those that no prompt of the sources can meet. Files are read as far as they have to be; seen: side and category of what was read."""
    left = [need for need in needs if not any(_may_meet_unread(pool, need) for pool in sources)]
    for pool in sources:
        if not isinstance(pool, JsonlPool | BuiltinPool):
            continue
        try:
            for prompt in usable_prompts(pool):
                if not left:
                    return []
                if not _is_asked_at_once(prompt, pool, config):
                    continue
                seen.add((prompt.side, prompt.tags.get("category", "")))
                left = [need for need in left if not need.is_met_by(prompt)]
        except (PromptFileError, OSError):  # its own problem, which is told; what it has is not known
            return []
    return left


def _may_meet_unread(pool: Pool, need: _Need) -> bool:
    match pool:
        case HubPool():
            return True
        case JsonlPool():
            return pool.path.startswith(WORLD_PREFIX)
        case ExternalPool():
            columns = set_of(pool).columns
            sides = set(columns.side.values.values()) if isinstance(columns.side, SideColumn) else {columns.side}
            return need.side in sides and (need.is_of_any_category or columns.category is not None)
    return False


def _is_asked_at_once(prompt: Prompt, pool: Pool, config: RunConfig) -> bool:
    """At the gate's first look, which needs prompts of its own beside the reserve."""
    prompts, seed = config.prompts, config.seed
    return (pool is not prompts.pool or is_held_out(prompt, config=prompts, seed=seed)) and not is_reserved(
        prompt, config=prompts, seed=seed
    )


def _told(need: _Need, known: list[str]) -> str:
    if need.is_of_any_category:
        where = "prompts.pool and prompts.eval_sets have none that is evaluated"
        return (
            f"{need.key}: {need.what} needs {need.side.value} prompts, and {where}: every round would be INVALID. Name a set that has some under "
            "prompts.eval_sets, or remove it"
        )
    more = " …" if len(known) > MOST_CATEGORIES_SHOWN else ""
    told = f"those of prompts.pool and prompts.eval_sets are of {', '.join(known[:MOST_CATEGORIES_SHOWN]) or 'none'}{more}"
    return (
        f"{need.key}: {need.what} watches {need.side.value} prompts of category {', '.join(need.categories)}, and {told}: every round would be "
        "INVALID. Mend the names, name a set that has them, or remove the veto"
    )
