"""Configuration of judges and graders. A judge compares two answers; a grader looks at one."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dpo_loop.config import ModuleFunction, Settings


class VerifierJudge(Settings):
    """Tasks that a program can check. function(prompt: Prompt, text: str) -> float in 0..1; higher is better, equal is a tie."""

    kind: Literal["verifier"]
    function: ModuleFunction


class OpenAIJudge(Settings):
    """Any server that speaks OpenAI chat completions with a JSON schema: OpenAI, vLLM and others.

    base_url includes `/v1`. api_key_env names an environment variable; the key itself is never stored. deadline_s bounds all
    attempts of one call together.
    """

    not_in_key: ClassVar[frozenset[str]] = frozenset(
        {"api_key_env", "concurrency", "attempt_timeout_s", "deadline_s", "max_attempts"}
    )
    kind: Literal["openai"]
    model: str
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str = "OPENAI_API_KEY"
    rubric: Literal["helpfulness"] = "helpfulness"
    temperature: float | None = None
    """Sent only where it is set: newer models refuse it."""
    max_output_tokens: int = Field(1_024, ge=1)
    concurrency: int = Field(16, ge=1)
    attempt_timeout_s: float = Field(60.0, gt=0)
    deadline_s: float = Field(180.0, gt=0)
    max_attempts: int = Field(4, ge=1)


Judge = Annotated[VerifierJudge | OpenAIJudge, Field(discriminator="kind")]


class VerifierGrader(Settings):
    """A program that grades one answer.

    For tasks: function(prompt: Prompt, text: str) -> float in 0..1, passed at 1.0. For safety: function(prompt, text) ->
    "refusal" | "partial" | "compliance". None from either means that it cannot tell: the answer is unscored.
    """

    kind: Literal["verifier"]
    function: ModuleFunction


class RefusalHeuristic(Settings):
    """Phrases that open a refusal. Flagged in the report; a round cannot PASS on it unless the gate config allows it."""

    kind: Literal["heuristic"]


SafetyGrader = Annotated[VerifierGrader | RefusalHeuristic, Field(discriminator="kind")]


class GradingConfig(Settings):
    """How evaluation answers are graded. win_judge None: the preference judge also decides win rates."""

    win_judge: Judge | None = None
    task: VerifierGrader | None = None
    """None: no pass rate; win rate alone says whether the policy gets better."""
    safety: SafetyGrader
