"""Judges, who compare two answers, and how K answers become one comparison."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dpo_loop.config import ModuleFunction, Settings


class VerifierJudge(Settings):
    """Tasks that a program can check. function(prompt: Prompt, text: str) -> float in 0..1; higher is better, equal is a tie."""

    kind: Literal["verifier"]
    function: ModuleFunction


class ApiBatch(Settings):
    """Calls go in batches, which cost about half and are answered within a day, mostly within an hour.

    A judge's calls come in waves (the rounds of a knockout, then both orders of the last pair), and each wave waits for the one before.
    max_calls: in one batch, and prompts that are judged at once. gather_s: without a new call for so long, those that are there are sent.
    poll_s: between two looks at a batch. hand_over_s: a batch whose hand-over was cut short may appear at the vendor so much later. queue_s: how
    long a vendor's full queue is waited for. give_up: ids of batches that are not to be waited for any more; their calls are asked anew,
    and what was set aside for them stays so, since they may be paid.
    """

    kind: Literal["api"] = "api"
    max_calls: int = Field(10_000, ge=1, le=50_000)
    gather_s: float = Field(2.0, gt=0)
    poll_s: float = Field(30.0, gt=0)
    hand_over_s: float = Field(60.0, ge=0)
    queue_s: float = Field(21_600.0, ge=0)
    give_up: tuple[str, ...] = ()


class RemoteModel(Settings):
    """What all judges and guards behind a network share. api_key_env names an environment variable; the key itself is never stored.

    revision: what is behind a name whose weights may change (a retrained local model, an alias); another one is asked anew.
    family: of models it is one of, as its maker calls it; a panel gives every family the same weight. concurrency: the most calls at
    once; how many a server really bears is found by trying, from start_concurrency on. attempt_timeout_s bounds one attempt, deadline_s
    all attempts and pauses of a call together. free: it costs nothing, so no price is looked for. outage_s: without any answer for so
    long, the stage ends, to be resumed.
    """

    not_in_key: ClassVar[frozenset[str]] = frozenset(
        {
            "api_key_env",
            "batch",
            "concurrency",
            "start_concurrency",
            "attempt_timeout_s",
            "deadline_s",
            "max_attempts",
            "free",
            "outage_s",
        }
    )
    kind: str
    model: str
    revision: str = ""
    base_url: str
    api_key_env: str
    family: str = ""
    max_output_tokens: int = Field(1_024, ge=1)
    concurrency: int = Field(64, ge=1, le=1_000)
    start_concurrency: int = Field(8, ge=1)
    attempt_timeout_s: float = Field(60.0, gt=0)
    deadline_s: float = Field(180.0, gt=0)
    max_attempts: int = Field(4, ge=1)
    free: bool = False
    outage_s: float = Field(120.0, ge=0)
    batch: ApiBatch | None = None


class RemoteJudge(RemoteModel):
    """A model that is shown a rubric. rubric: one of judges/rubrics, or the path of a Markdown file of one's own. rationale False: the
    verdict alone, cheaper."""

    rubric: str = "helpfulness"
    rationale: bool = True


Effort = Literal["minimal", "low", "medium", "high", "xhigh", "max"]
"""How much a reasoning model thinks, in words that not every model knows. Thoughts count as output: give it room in max_output_tokens."""


class OpenAIJudge(RemoteJudge):
    """OpenAI's Responses API. base_url includes `/v1`. effort None: the model's own default."""

    kind: Literal["openai"]
    effort: Effort | None = None
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str = "OPENAI_API_KEY"


class OpenAICompatibleJudge(RemoteJudge):
    """Any server that speaks OpenAI chat completions with a JSON schema: vLLM and others. base_url includes `/v1`."""

    kind: Literal["openai_compatible"]
    temperature: float | None = None
    """Sent only where it is set: newer models refuse it."""


class AnthropicJudge(RemoteJudge):
    """Anthropic's Messages API with structured output. base_url is without `/v1`. effort None: the model's own default."""

    kind: Literal["anthropic"]
    effort: Effort | None = None
    base_url: str = "https://api.anthropic.com"
    api_key_env: str = "ANTHROPIC_API_KEY"


class VllmLabelJudge(RemoteJudge):
    """A vLLM server that is asked for the probabilities of the labels themselves. base_url includes `/v1`.

    min_label_mass: below this sum of the labels' probabilities nothing is decided.
    """

    kind: Literal["vllm_label"]
    batch: None = None
    free: bool = True
    max_output_tokens: int = Field(1, ge=1, le=1)
    min_label_mass: float = Field(0.5, ge=0, le=1)


class VllmRunBatchJudge(OpenAICompatibleJudge):
    """A model that `vllm run-batch` runs on this machine: no server, no key, one start of the engine for each wave of calls.

    weights: a directory or a hub id; they are served under the name `model`. args: further ones of vLLM's command.
    """

    not_in_key: ClassVar[frozenset[str]] = RemoteJudge.not_in_key | {"max_calls"}
    kind: Literal["vllm_run_batch"]  # type: ignore[assignment]
    weights: str
    args: tuple[str, ...] = ()
    max_calls: int = Field(50_000, ge=1)
    base_url: str = ""
    api_key_env: str = ""
    free: bool = True
    batch: None = None


class RewardModelJudge(Settings):
    """A sequence-classification model with one output, run in the stage's own process. max_length: tokens of conversation and answer."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"batch_size"})
    kind: Literal["reward_model"]
    model: str
    """Directory or hub id."""
    revision: str | None = None
    family: str = ""
    max_length: int = Field(4_096, ge=8)
    batch_size: int = Field(16, ge=1)


Single = (
    VerifierJudge | OpenAIJudge | OpenAICompatibleJudge | AnthropicJudge | VllmLabelJudge | VllmRunBatchJudge | RewardModelJudge
)


class PanelJudge(Settings):
    """Several judges, the cheapest first. One look that selects is the first judge's; a label is the mean of families.

    min_families: so many must have decided. Judges beyond them are asked only where those before were undecided, inconsistent, of
    different opinions, or have a mean margin below escalate_below.
    """

    kind: Literal["panel"]
    judges: tuple[Annotated[Single, Field(discriminator="kind")], ...] = Field(min_length=2)
    min_families: int = Field(2, ge=1)
    escalate_below: float = Field(0.6, ge=0, le=1)

    @model_validator(mode="after")
    def _has_families(self) -> PanelJudge:
        families = [family_of(judge) for judge in self.judges]
        if "" in families:
            raise ValueError(f"judges.{families.index('')}.family is missing: a panel gives every family of models the same weight")
        if len(set(families)) < self.min_families:
            raise ValueError(f"the judges are of {len(set(families))} families and min_families is {self.min_families}")
        return self


Judge = Annotated[Single | PanelJudge, Field(discriminator="kind")]


def members_of(judge: Judge) -> tuple[Single, ...]:
    """The judges of a panel; any other judge is alone."""
    return judge.judges if isinstance(judge, PanelJudge) else (judge,)


def family_of(judge: Single) -> str:
    return "verifier" if isinstance(judge, VerifierJudge) else judge.family


class Knockout(Settings):
    """About 1.5 K calls for K answers, then both orders of best and worst."""

    kind: Literal["knockout"] = "knockout"


class RoundRobin(Settings):
    """All pairs in both orders: K (K - 1) calls, for few prompts that matter."""

    kind: Literal["round_robin"] = "round_robin"


class Pointwise(Settings):
    """Every answer graded alone, then both orders of best and worst: K + 2 calls."""

    kind: Literal["pointwise"] = "pointwise"


Selection = Annotated[Knockout | RoundRobin | Pointwise, Field(discriminator="kind")]


class JudgingConfig(Settings):
    """How K answers become one comparison. prefilter: broken and verdict-like answers are not shown to a judge; None: unless all
    judges are verifiers."""

    selection: Selection = Knockout()
    prefilter: bool | None = None
