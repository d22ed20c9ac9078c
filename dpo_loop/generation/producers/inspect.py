"""inspect_ai (0.3.285): one CapabilityRow per sample of a task. See the package's docstring for how it is run.

An evaluation that fails does not raise, and one that succeeds may have samples without a score: both are looked at here. A process can
play one evaluation only.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from inspect_ai import eval as evaluate
from inspect_ai.model import get_model
from inspect_ai.scorer import value_to_float

from dpo_loop.config import InspectTask
from dpo_loop.errors import InputError, InvalidRoundError
from dpo_loop.generation.producers.request import ItemIds, Request, answer_request, model_arguments, policy_on
from dpo_loop.types import CapabilityRow


def produce(request: Request) -> list[CapabilityRow]:
    """Raises InputError for a scorer that does not exist, CanaryError, and InvalidRoundError for an evaluation that is not whole."""
    task = request.task
    assert isinstance(task, InspectTask)
    policy = request.policy
    model = get_model(
        "hf/policy",
        model_path=policy.base,
        tokenizer_path=policy.base,
        do_sample=False,
        memoize=False,
        **model_arguments(request),
        **({} if policy.revision is None else {"revision": policy.revision}),
    )
    served: Any = model.api
    served.model = policy_on(request, served.model)
    [log] = evaluate(
        task.task if request.file is None else f"{request.file}@{task.task}",
        model=model,
        task_args=task.arguments,
        limit=task.limit,
        epochs=1,
        fail_on_error=False,
        display="none",
        log_dir=str(Path(request.rows).with_suffix(".logs")),
        seed=request.seed,
    )
    if log.status != "success" or log.results is None:
        why = log.error.message if log.error else f"its status is {log.status}"
        raise InvalidRoundError(f"inspect_ai could not play task {task.task}: {why}")
    samples = log.samples or []
    size = log.eval.dataset.samples or 0
    wanted = size if task.limit is None else min(size, task.limit)
    if len(samples) != wanted:
        raise InvalidRoundError(f"inspect_ai gave {len(samples)} samples of task {task.task} where {wanted} were asked")
    scorer = _scorer(task, sorted(scorer.name for scorer in log.eval.scorers or []))
    ids = ItemIds()
    return [_row(task, ids.of(_content(sample)), scorer, sample) for sample in samples]


def _scorer(task: InspectTask, offered: list[str]) -> str:
    if task.metric in offered:
        return task.metric
    if task.metric is None and len(offered) == 1:
        return offered[0]
    raise InputError(f"`metric` must name one of the scorers of inspect_ai task {task.task}: {', '.join(offered) or 'it has none'}")


def _content(sample: Any) -> list[Any]:
    asked = sample.input if isinstance(sample.input, str) else [[message.role, message.text] for message in sample.input]
    return [asked, sample.choices, sample.target]


def _row(task: InspectTask, item_id: str, scorer: str, sample: Any) -> CapabilityRow:
    """Right where the score is C, true or 1; a partial one is wrong; a sample that failed or was not graded has none."""
    score = (sample.scores or {}).get(scorer)
    value = None
    if score is not None and sample.error is None:
        if isinstance(score.value, dict | list):
            raise InputError(
                f"scorer {scorer} of inspect_ai task {task.task} gives several figures; take one that gives right or wrong"
            )
        figure = float(value_to_float()(score.value))
        if math.isfinite(figure) and not 0 <= figure <= 1:
            raise InputError(
                f"scorer {scorer} of inspect_ai task {task.task} gives {figure:g}, which is neither right (1) nor wrong (0)"
            )
        value = float(figure == 1) if math.isfinite(figure) else None
    return CapabilityRow(task=task.id, item_id=item_id, measure="correct", value=value, response=sample.output.completion)


if __name__ == "__main__":
    answer_request(produce)
