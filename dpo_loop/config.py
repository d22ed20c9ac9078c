"""Configuration of each room. Units are in the names; unknown keys are refused; every default is recorded with the run.

Variants are unions tagged by `kind`, which has no default so that a form or an API call must name it. What does not change what a
stage makes (how it is served, how fast, what makes it refuse) is listed in `not_in_key` and leaves the stage's key alone.
Defaults are those of a 7-9B model on one GPU (design §6); the tiny world of the demo has its own in deploy/configs/demo.yaml.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from dpo_loop.types import Record

Fraction = Annotated[float, Field(ge=0, le=1)]
ModuleFunction = Annotated[str, Field(pattern=r"^[\w.]+:\w+$", description="module:function, importable by the stage's process")]


class Settings(Record):
    """Base of every config: what people write. Infinity and NaN, which a measured figure may be, are refused."""

    model_config = ConfigDict(allow_inf_nan=False)


# ------------------------------------------------------------------------------------------------------------ tiny world


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


# -------------------------------------------------------------------------------------------------------------- prompts


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


# ----------------------------------------------------------------------------------------------------------- generation


class EngineConfig(Settings):
    """How vLLM is run. None of it changes what is sampled in distribution."""

    not_in_key: ClassVar[frozenset[str]] = frozenset(
        {"gpu_memory_utilization", "cpu_kvcache_gib", "max_num_seqs", "canary_tolerance"}
    )
    kind: Literal["vllm_offline"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int = Field(2_048, ge=16)
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = 64
    tensor_parallel: int = Field(1, ge=1)
    gpu_memory_utilization: Fraction = 0.9
    cpu_kvcache_gib: int = Field(1, ge=1)
    max_num_seqs: int = Field(256, ge=1)
    enforce_eager: bool = False
    canary_tolerance: float = Field(5e-2, gt=0)
    """Largest mean absolute difference, nats per token, between the engine's log-probs and transformers+peft's."""


class GenerationConfig(Settings):
    engine: EngineConfig
    k: int = Field(4, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(1_024, ge=1)
    shard_size: int = Field(256, ge=1)
    """Prompts per shard: the unit of resume."""


# -------------------------------------------------------------------------------------------------------------- pairing


class PairingConfig(Settings):
    min_margin: Fraction = 0.2
    """A pair needs |2p - 1| of at least this."""
    max_length_ratio: float = Field(4.0, ge=1)
    """Longer over shorter completion, in tokens, above which a pair is dropped."""
    drop_truncated: bool = True
    min_pairs: int = Field(1, ge=1)
    """Fewer pairs than this make the round INVALID."""


# ------------------------------------------------------------------------------------------------------------- training


class SigmoidLoss(Settings):
    """DPO (arXiv 2305.18290 eq. 7)."""

    kind: Literal["sigmoid"]
    beta: float = Field(0.1, gt=0)


class LoraShape(Settings):
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target: str = "all-linear"
    """`all-linear` (every linear layer but the head) or a comma-separated list of module names."""


class OptimizerConfig(Settings):
    lr: float = Field(5e-6, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.1
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)


class TrainingConfig(Settings):
    not_in_key: ClassVar[frozenset[str]] = frozenset({"checkpoint_every_steps", "micro_batch_tokens", "gradient_checkpointing"})
    loss: SigmoidLoss
    nll_weight: float = Field(0.0, ge=0)
    """Weight of the length-normalised negative log-likelihood of chosen, per sequence (arXiv 2404.19733)."""
    lora: LoraShape = LoraShape()
    optimizer: OptimizerConfig = OptimizerConfig()
    start: Literal["continue", "fresh"] = "continue"
    reference: Literal["round_start", "run_start"] = "round_start"
    epochs: int = Field(1, ge=1)
    pairs_per_step: int = Field(64, ge=1)
    micro_batch_tokens: int = Field(8_192, ge=1)
    max_length: int = Field(2_048, ge=2)
    """Prompt plus completion, tokens; longer pairs are dropped, never truncated."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = False
    checkpoint_every_steps: int = Field(50, ge=1)
    seed: int = 0


class SftConfig(Settings):
    not_in_key: ClassVar[frozenset[str]] = frozenset({"checkpoint_every_steps", "micro_batch_tokens"})
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4)
    epochs: int = Field(1, ge=1)
    examples_per_step: int = Field(64, ge=1)
    micro_batch_tokens: int = Field(8_192, ge=1)
    max_length: int = Field(2_048, ge=2)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lora: LoraShape | None = None
    """None trains all weights."""
    checkpoint_every_steps: int = Field(200, ge=1)
    seed: int = 0


class ModelStart(Settings):
    """Take a model (and perhaps an adapter) as it is. model: a directory or a hub id."""

    kind: Literal["model"]
    model: str
    revision: str | None = None
    adapter: str | None = None


class SftStart(Settings):
    """Run SFT on demonstrations first. demonstrations: JSONL of {"messages": [...]} ending with an assistant turn."""

    kind: Literal["sft"]
    model: str
    revision: str | None = None
    demonstrations: str
    sft: SftConfig


Start = Annotated[ModelStart | SftStart, Field(discriminator="kind")]

# ----------------------------------------------------------------------------------------------------------- evaluation


class AnswerConfig(Settings):
    """How candidate, previous and anchor answer the evaluation prompts: the same for all three."""

    temperature: float = Field(0.0, ge=0)
    max_new_tokens: int = Field(1_024, ge=1)


Metric = Literal["pass_rate", "win_rate", "lc_win_rate", "harmful_rate", "over_refusal_rate", "degenerate_rate"]
HIGHER_IS_BETTER: frozenset[str] = frozenset({"pass_rate", "win_rate", "lc_win_rate"})
WIN_RATES: frozenset[str] = frozenset({"win_rate", "lc_win_rate"})
METRIC_NAMES: dict[str, str] = {
    "pass_rate": "pass rate",
    "win_rate": "win rate",
    "lc_win_rate": "win rate at equal length",
    "harmful_rate": "harmful compliance",
    "over_refusal_rate": "over-refusal",
    "degenerate_rate": "degenerate output",
}
"""As people read them, in reasons and reports."""


class CheckConfig(Settings):
    """One rule of the gate.

    non_inferior: the one-sided upper limit of the worsening against `vs` stays below margin. ceiling: the Clopper-Pearson upper
    limit of the candidate's rate stays below margin. floor: the lower limit of the rate stays above margin (win rate). lc_win_rate: the win rate
    that answers of equal length would have; where no answers differ in length, the win rate itself.
    severity: what a broken rule makes of the round.
    """

    id: str = Field(min_length=1)
    metric: Metric
    rule: Literal["non_inferior", "ceiling", "floor"]
    vs: Literal["previous", "anchor"] | None = None
    margin: Fraction
    severity: Literal["fail", "review"] = "fail"

    @model_validator(mode="after")
    def _reference_named(self) -> CheckConfig:
        if (self.rule == "non_inferior" or self.metric in WIN_RATES) and self.vs is None:
            raise ValueError(f"check {self.id}: {self.rule} of {self.metric} needs `vs: previous` or `vs: anchor`")
        if self.rule != "non_inferior" and (self.rule == "floor") != (self.metric in HIGHER_IS_BETTER):
            way_out = "a floor is for pass_rate and win rates, a ceiling for the rates that should be low"
            raise ValueError(f"check {self.id}: {self.rule} of {self.metric} would reward the wrong direction; {way_out}")
        if self.rule != "non_inferior" and self.metric not in WIN_RATES and self.vs is not None:
            raise ValueError(f"check {self.id}: {self.rule} of {self.metric} looks at the candidate alone; leave out `vs`")
        return self


class VetoConfig(Settings):
    """Too few prompts for statistics, and too grave to overlook: so many of one category that are newly bad send the round to a person.

    categories: by name, or "*" for each one. metric: newly harmful or newly over-refused. vs: bad now, and not with that policy.
    """

    id: str = Field(min_length=1)
    categories: tuple[str, ...] = Field(min_length=1)
    metric: Literal["harmful_rate", "over_refusal_rate"] = "harmful_rate"
    vs: Literal["previous", "anchor"] = "previous"
    new_bad: int = Field(1, ge=1)
    severity: Literal["fail", "review"] = "review"


class GateConfig(Settings):
    alpha: float = Field(0.05, gt=0, lt=0.5)
    checks: tuple[CheckConfig, ...] = Field(min_length=1)
    vetoes: tuple[VetoConfig, ...] = ()
    max_unscored: Fraction = 0.01
    """Share of ungraded answers above which the round is INVALID; below it they count as the worst case."""
    allow_heuristic_judge: bool = False
    """A keyword heuristic may not PASS a round unless this says so."""

    @model_validator(mode="after")
    def _ids_differ(self) -> GateConfig:
        ids = [*(check.id for check in self.checks), *(veto.id for veto in self.vetoes)]
        if twice := sorted({id for id in ids if ids.count(id) > 1}):
            raise ValueError(f"checks or vetoes share the id {', '.join(twice)}; give each its own")
        return self
