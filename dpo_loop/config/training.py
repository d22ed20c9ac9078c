"""Where a run starts, and how it trains."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dpo_loop.config.base import Fraction, Settings
from dpo_loop.config.losses import Loss

Seed = Annotated[int, Field(ge=0, lt=2**63, description="what torch takes for one")]


class LoraShape(Settings):
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target: str = "all-linear"
    """`all-linear` (every linear layer but the head) or a comma-separated list of module names."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """rsLoRA (arXiv 2312.03732) scales by alpha / sqrt(rank); DoRA (arXiv 2402.09353) also learns magnitudes, and no engine serves it unmerged."""


class OptimizerConfig(Settings):
    lr: float = Field(5e-6, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.1
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)


class HeldOutConfig(Settings):
    """Pairs that are not trained on, to see whether what is learnt holds for pairs that were never seen."""

    share: Fraction = 0.05
    """Of the round's pairs; 0 holds none out. Fewer than min_pairs are not worth holding out: then none are."""
    min_pairs: int = Field(16, ge=1)
    max_pairs: int = Field(256, ge=1)
    every_steps: int = Field(10, ge=1)
    """Optimizer steps between two looks at them; the last step always looks."""
    patience: int | None = Field(None, ge=1)
    """Early stop: this many looks without a lower held-out loss end training, with the weights of the best look. None never stops early."""


class AlarmLimits(Settings):
    """Past `warn` an alarm is recorded and shown; past `stop` training ends and the round is INVALID. None never does."""

    warn: float | None
    stop: float | None


class AlarmsConfig(Settings):
    """When training says that something is wrong. Starting values of facts/training.md §11; tune them."""

    accuracy: AlarmLimits = AlarmLimits(warn=0.95, stop=None)
    """Reward accuracy of training, mean over the last window_steps: pairs this easy leak length or format, or are learnt by heart."""
    accuracy_gap: AlarmLimits = AlarmLimits(warn=0.2, stop=None)
    """Accuracy of training less accuracy on held-out pairs."""
    held_out_accuracy: AlarmLimits = AlarmLimits(warn=0.55, stop=None)
    """Below it."""
    margin: AlarmLimits = AlarmLimits(warn=5.0, stop=10.0)
    """Beta-scaled reward margin."""
    chosen_logprob_drop: AlarmLimits = AlarmLimits(warn=0.1, stop=0.3)
    """How far chosen fell below the reference, nats per token: likelihood displacement (arXiv 2410.08847)."""
    falling_share: AlarmLimits = AlarmLimits(warn=0.7, stop=None)
    """Share of pairs whose chosen completion is less likely than under the reference."""
    rejected_logprob_drop: AlarmLimits = AlarmLimits(warn=1.0, stop=None)
    """Nats per token."""
    kl: AlarmLimits = AlarmLimits(warn=0.1, stop=None)
    """Estimated KL to the reference on the pairs' completions, nats per token."""
    clipped_share: AlarmLimits = AlarmLimits(warn=0.5, stop=None)
    """Share of the steps so far whose gradient was clipped. Not judged for ipo, sppo_hard, sigmoid_norm, simpo and orpo: their gradients
    have another scale, and clipping is usual in them."""
    window_steps: int = Field(5, ge=1)
    """Figures are means over so many steps, so that one odd batch raises nothing. A training of fewer, at least three, is judged at its end
    over all of them."""


class TrainingConfig(Settings):
    not_in_key: ClassVar[frozenset[str]] = frozenset(
        {
            "checkpoint_every_steps",
            "micro_batch_tokens",
            "gradient_checkpointing",
            "forward",
            "feedback",
            "trackers",
            "num_processes",
            "accelerate_config",
        }
    )
    loss: Loss
    feedback: str | None = None
    """Of kto: JSONL of {"messages": [...] ending with an assistant turn, "thumbs_up": true or false}, trained on beside the round's pairs."""
    nll_weight: float = Field(0.0, ge=0)
    """Weight of the length-normalised negative log-likelihood of chosen, per sequence (arXiv 2404.19733)."""
    lora: LoraShape = LoraShape()
    quantize_base: Literal["nf4"] | None = None
    """QLoRA (arXiv 2305.14314): the frozen base in 4 bits, for policy and reference alike; CUDA and bitsandbytes."""
    optimizer: OptimizerConfig = OptimizerConfig()
    start: Literal["continue", "fresh"] = "continue"
    reference: Literal["round_start", "run_start"] = "round_start"
    epochs: int = Field(1, ge=1)
    pairs_per_step: int = Field(64, ge=1)
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Tokens of one forward and backward pass; `auto` takes what the memory plan allows."""
    max_length: int = Field(2_048, ge=2)
    """Prompt plus completion, tokens; longer pairs are dropped, never truncated."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """`auto` recomputes activations only where the memory plan says that they do not fit."""
    forward: Literal["auto", "padded"] = "auto"
    """`auto` shares prompts and packs rows where a probe at the start shows that the model computes the same; `padded` never tries."""
    held_out: HeldOutConfig = HeldOutConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where figures are sent too, through accelerate; the stage's own metrics.jsonl is always written."""
    num_processes: int = Field(1, ge=1)
    """Data parallel: processes of one `accelerate launch` on this machine. Without dropout the loss curve is that of one process."""
    accelerate_config: str | None = None
    """A file of `accelerate config` for what num_processes cannot say: deploy/accelerate/fsdp2.yaml keeps a large base in shards."""
    checkpoint_every_steps: int = Field(50, ge=1)
    seed: Seed = 0

    @model_validator(mode="after")
    def _feedback_is_of_kto(self) -> Self:
        if self.feedback is not None and self.loss.kind != "kto":
            raise ValueError(
                f"feedback has no pairs, and only kto learns from that; loss.kind is {self.loss.kind}: leave feedback out, or take kto"
            )
        return self


class SftConfig(Settings):
    not_in_key: ClassVar[frozenset[str]] = frozenset(
        {"checkpoint_every_steps", "micro_batch_tokens", "forward", "gradient_checkpointing"}
    )
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4)
    epochs: int = Field(1, ge=1)
    examples_per_step: int = Field(64, ge=1)
    micro_batch_tokens: int = Field(8_192, ge=1)
    max_length: int = Field(2_048, ge=2)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    forward: Literal["auto", "padded"] = "auto"
    """As in training."""
    gradient_checkpointing: bool = False
    train_on: Literal["last_turn", "all_turns"] = "last_turn"
    """Which assistant turns of a demonstration are learnt; the others are context."""
    lora: LoraShape | None = None
    """None trains all weights."""
    checkpoint_every_steps: int = Field(200, ge=1)
    seed: Seed = 0


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
