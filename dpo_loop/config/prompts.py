"""Where prompts come from, those that train and those that evaluate."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dpo_loop.config.base import Fraction, Settings
from dpo_loop.types import Side


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


class SideColumn(Settings):
    """A column that says which side a row is on: `{field: label, values: {safe: benign, unsafe: harmful}}`."""

    field: str
    values: dict[str, Literal[Side.HARMFUL, Side.BENIGN]] = Field(min_length=1)


class ExternalColumns(Settings):
    prompt: str = "prompt"
    category: str | None = None
    side: Literal[Side.HARMFUL, Side.BENIGN] | SideColumn
    """One for all rows, or a column."""


class ExternalPool(Settings):
    """A published evaluation set of the Hugging Face hub: never bundled, never trained on, loaded at one commit under a licence that was read.

    dpo_loop/prompts/external.py knows the named ones; `custom` is any other and says itself where it is and what its columns are.
    """

    # It only refuses: a set that can be had is the same set either way.
    not_in_key: ClassVar[frozenset[str]] = frozenset({"required"})
    kind: Literal["external"]
    set: Literal[
        "xstest",
        "strongreject",
        "harmbench-standard",
        "or-bench-hard",
        "or-bench-toxic",
        "advbench",
        "do-not-answer",
        "sorry-bench",
        "wildguardmix-test",
        "custom",
    ]
    licence_ack: str = ""
    """The name of the set's licence, written by a person who read it."""
    required: bool = True
    """false: where it cannot be loaded, the run goes on without it and every report says so."""
    revision: str | None = None
    """A commit, 40 hex digits; null takes the one that the project pins, if it pins one."""
    source: str | None = None
    name: str | None = None
    split: str | None = None
    columns: ExternalColumns | None = None
    """source (org/name), name of the config, split and columns: of `custom` only."""

    @field_validator("revision")
    @classmethod
    def _a_commit(cls, revision: str | None) -> str | None:
        if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise ValueError(
                "a branch or tag can move, and a short hash is not known to the hub; give the 40 hex digits of a commit from the data set's history"
            )
        return revision

    @model_validator(mode="after")
    def _custom_says_all(self) -> Self:
        own = {"source": self.source, "split": self.split, "columns": self.columns}
        if self.set == "custom":
            missing = [name for name, value in {**own, "revision": self.revision}.items() if value is None]
            if missing:
                raise ValueError(f"a custom set needs {', '.join(missing)}")
        elif given := [name for name, value in {**own, "name": self.name}.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} of {self.set} are known; remove them, or write `set: custom`")
        return self


TrainingPool = Annotated[JsonlPool | HubPool, Field(discriminator="kind")]
Pool = Annotated[JsonlPool | HubPool | BuiltinPool | ExternalPool, Field(discriminator="kind")]


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
    eval_reserve: Fraction = 0.0
    """Share of all evaluation prompts held back by hash, pairs whole: asked only when the gate's first look cannot decide. Never trained on."""
    skip_bad: bool = False

    @field_validator("pool", mode="before")
    @classmethod
    def _not_an_evaluation_set(cls, pool: Any) -> Any:
        kind = pool.get("kind") if isinstance(pool, dict) else getattr(pool, "kind", None)
        if kind in ("builtin", "external"):
            article = "a built-in" if kind == "builtin" else "an external"
            raise ValueError(
                f"{article} set only evaluates and is never trained on; name prompts of your own here, and the set under prompts.eval_sets"
            )
        return pool
