"""What a policy should not forget while it learns preferences: tasks of the run's own, or of lm-eval-harness and inspect_ai.

Every task has one file or folder, `path`: it says where the items are, is left out of a stage's key, and its content is in it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dpo_loop.config.base import Settings

TaskId = Annotated[str, Field(pattern=r"^[\w.-]+$", description="letters, digits, _ . -")]


class ExactMatchTask(Settings):
    """Lines of {"prompt" or "messages", "answer": text or a list of accepted texts}; other keys are passed over.

    The policy answers greedily. It is right where the whole answer is an accepted text; white space around either does not count.
    """

    not_in_key: ClassVar[frozenset[str]] = frozenset({"path"})
    kind: Literal["exact_match"]
    id: TaskId
    path: str
    max_new_tokens: int = Field(64, ge=1)
    casefold: bool = False
    """Upper and lower case are the same."""


class MultipleChoiceTask(Settings):
    """Lines of {"prompt" or "messages", "choices": [...], "answer": index from 0}. The likeliest choice must be the right one; a tie is wrong."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"path"})
    kind: Literal["multiple_choice"]
    id: TaskId
    path: str
    length_normalised: bool = True
    """Compare mean log-probs per token, rather than sums, which favour short choices."""


class PerplexityTask(Settings):
    """Held-out text: lines of {"text"} in a file that ends with .jsonl, else plain text whose documents are parted by blank lines."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"path"})
    kind: Literal["perplexity"]
    id: TaskId
    path: str


class LmEvalTask(Settings):
    """Tasks of lm-eval-harness, played by transformers+peft in a process of their own."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"path", "python", "batch_size"})
    kind: Literal["lm_eval"]
    id: TaskId
    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks or groups."""
    metric: str = "acc"
    """A metric with one figure per sample, right (1) or wrong (0), or a log-likelihood; `metric,filter` where answers are filtered in several ways."""
    num_fewshot: int | None = Field(None, ge=0)
    """None: as the task says."""
    limit: int | None = Field(None, ge=1)
    """Samples per task, the first so many; None: all."""
    chat_template: bool = True
    path: str | None = None
    """A folder with tasks in YAML (lm-eval's include_path), which is also where it runs: data files are named relative to it."""
    python: str | None = None
    """An interpreter that has lm_eval; None: this one."""
    batch_size: int = Field(8, ge=1)


class InspectTask(Settings):
    """A task of inspect_ai, played by its `hf` provider, greedily, in a process of its own. A partial score is not right."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"path", "python"})
    kind: Literal["inspect"]
    id: TaskId
    task: str
    """The task's name in `path`, or in the registry: inspect_evals/arc_easy."""
    arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Of the task."""
    metric: str | None = None
    """Which scorer's figure counts; None: the task has only one."""
    limit: int | None = Field(None, ge=1)
    path: str | None = None
    """A Python file that defines the task. What that file reads is not in the stage's key."""
    python: str | None = None
    """An interpreter that has inspect_ai; None: this one."""


LocalTask = ExactMatchTask | MultipleChoiceTask | PerplexityTask
ProducedTask = LmEvalTask | InspectTask
CapabilityTask = Annotated[LocalTask | ProducedTask, Field(discriminator="kind")]


class CapabilityConfig(Settings):
    tasks: tuple[CapabilityTask, ...] = ()

    @model_validator(mode="after")
    def _ids_differ(self) -> CapabilityConfig:
        ids = [task.id for task in self.tasks]
        if twice := sorted({id for id in ids if ids.count(id) > 1}):
            raise ValueError(f"capability tasks share the id {', '.join(twice)}; give each its own")
        return self
