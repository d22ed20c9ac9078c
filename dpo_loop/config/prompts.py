"""Where prompts come from, those that train and those that evaluate."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from dpo_loop.config.base import Fraction, Settings


class TinyWorldConfig(Settings):
    """The verifiable world of the demo (dpo_loop/quickstart)."""

    seed: int = 17
    num_demonstrations: int = Field(12_000, ge=100)
    wrong_demonstrations: Fraction = 0.35
    """Share of demonstrations that are deliberately wrong, so that the seed policy is a mixture DPO can improve."""
    num_prompts: int = Field(4_000, ge=10)
    num_harmful: int = Field(600, ge=2)
    """Evaluation prompts that want a refusal."""
    num_benign: int = Field(600, ge=2)
    """Their benign twins, which want an answer."""


class JsonlPool(Settings):
    """Lines of {"messages": [...]} or {"prompt": "..."} with optional "tags"."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"path"})
    kind: Literal["jsonl"]
    path: str


class HubPool(Settings):
    """Anything `datasets.load_dataset` reads; column holds a string or a list of messages."""

    kind: Literal["datasets"]
    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "prompt"
    data_files: str | None = None


class BuiltinPool(Settings):
    """A set that comes with the package, harmful prompts and their benign twins: for evaluation, never for training."""

    kind: Literal["builtin"]
    set: Literal["core-v1"]
    split: Literal["core", "smoke", "sealed"] = "core"
    """core: all 420. smoke: 56, for a quick look. sealed: a fifth, to see whether the rest was tuned for."""


TrainingPool = Annotated[JsonlPool | HubPool, Field(discriminator="kind")]
Pool = Annotated[JsonlPool | HubPool | BuiltinPool, Field(discriminator="kind")]


class PromptsConfig(Settings):
    # Both only refuse: where nothing is bad and no bucket comes again, the same file is made either way; else none is.
    not_in_key: ClassVar[frozenset[str]] = frozenset({"skip_bad", "reuse"})
    pool: TrainingPool
    eval_sets: tuple[Pool, ...] = ()
    """Further evaluation prompts, tagged `side: harmful` or `side: benign` by their lines; never trained on."""
    num_per_round: int = Field(2_000, ge=1)
    num_buckets: int = Field(8, ge=1)
    """The pool is cut into this many by hash; round t takes bucket t."""
    reuse: Literal["fresh", "cycle"] = "fresh"
    """When the buckets are used up: stop (`fresh`) or begin again (`cycle`, recorded)."""
    eval_fraction: Fraction = 0.1
    """Share of the pool carved out first for evaluation, by hash."""
    max_eval: int = Field(800, ge=1)
    skip_bad: bool = False

    @field_validator("pool", mode="before")
    @classmethod
    def _no_builtin_set(cls, pool: Any) -> Any:
        if isinstance(pool, BuiltinPool) or (isinstance(pool, dict) and pool.get("kind") == "builtin"):
            raise ValueError(
                "a built-in set only evaluates and is never trained on; name prompts of your own here, and the set under prompts.eval_sets"
            )
        return pool
