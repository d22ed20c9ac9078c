"""lm-eval-harness (0.4.13): one CapabilityRow per sample of its tasks. See the package's docstring for how it is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dpo_loop.config import LmEvalTask
from dpo_loop.errors import InputError, InvalidRoundError
from dpo_loop.generation.producers.request import ItemIds, Request, answer_request, model_arguments, policy_on
from dpo_loop.types import CapabilityRow


def produce(request: Request) -> list[CapabilityRow]:
    """Raises InputError for a task or metric that does not exist, CanaryError, and InvalidRoundError where samples are missing."""
    task = request.task
    assert isinstance(task, LmEvalTask)
    policy = request.policy
    manager = TaskManager(include_path=request.file)
    if unknown := sorted(set(task.tasks) - set(manager.all_tasks)):
        raise InputError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, and `path` names a folder with more"
        )
    model = HFLM(
        pretrained=policy.base,
        revision=policy.revision or "main",
        batch_size=task.batch_size,
        **model_arguments(request),
    )
    # Its own way to load an adapter cuts padded embeddings to the tokenizer's size, and does so for policies with an adapter alone.
    model._model = policy_on(request, model.model)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(task.tasks),
        num_fewshot=task.num_fewshot,
        limit=task.limit,
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=task.chat_template,
        task_manager=manager,
        random_seed=request.seed,
        numpy_random_seed=request.seed,
        torch_random_seed=request.seed,
        fewshot_random_seed=request.seed,
    )
    rows = []
    for name, samples in sorted(found["samples"].items()):
        samples = _of_metric(samples, task.metric, name)
        size = found["n-samples"][name]["original"]
        wanted = size if task.limit is None else min(size, task.limit)
        if len(samples) != wanted:
            raise InvalidRoundError(f"lm-eval gave {len(samples)} samples of task {name} where {wanted} were asked")
        ids = ItemIds()
        rows += [_row(task, ids.of(name, sample["doc_hash"]), sample) for sample in samples]
    return rows


def _of_metric(samples: Sequence[dict[str, Any]], metric: str, name: str) -> list[dict[str, Any]]:
    """The samples as filtered for the metric. Raises InputError where there is none, or more than one way to filter them."""
    key, _, filtered = metric.partition(",")
    having = [sample for sample in samples if key in sample["metrics"] and filtered in ("", sample["filter"])]
    if len({sample["filter"] for sample in having}) == 1:
        return having
    offered = sorted({f"{key},{sample['filter']}" for sample in samples for key in sample["metrics"]})
    raise InputError(f"metric {metric} does not name one figure of lm-eval task {name}; it has {' | '.join(offered)}")


def _row(task: LmEvalTask, item_id: str, sample: dict[str, Any]) -> CapabilityRow:
    """A pair is a log-likelihood and its words or bytes, which lm-eval's rolling perplexities are made of; else it is right or wrong."""
    value = sample[task.metric.partition(",")[0]]
    said = sample["filtered_resps"][0]
    response = said if isinstance(said, str) else ""
    if isinstance(value, tuple | list):
        loglikelihood, weight = (float(x) for x in value)
        nll = -loglikelihood if math.isfinite(loglikelihood) else None
        return CapabilityRow(task=task.id, item_id=item_id, measure="nll", value=nll, weight=weight)
    figure = float(value)
    if figure not in (0.0, 1.0) and math.isfinite(figure):
        raise InputError(
            f"metric {task.metric} gives {figure:g} to a sample, which is neither right (1) nor wrong (0); take another metric"
        )
    correct = figure if math.isfinite(figure) else None
    return CapabilityRow(task=task.id, item_id=item_id, measure="correct", value=correct, response=response)


if __name__ == "__main__":
    answer_request(produce)
