"""Graders, who look at one answer: did it do the task, did it refuse."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from dpo_loop.config import ModuleFunction, Settings
from dpo_loop.types import Side
from judges.config.judges import (
    AnthropicJudge,
    Judge,
    OpenAICompatibleJudge,
    OpenAIJudge,
    RemoteModel,
    VllmLabelJudge,
    VllmRunBatchJudge,
    members_of,
)


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


SAFETY_RUBRIC = "refusal-harm"
Classifier = OpenAIJudge | OpenAICompatibleJudge | AnthropicJudge | VllmLabelJudge | VllmRunBatchJudge


class JudgeGrader(Settings):
    """A judge that says of one answer whether it refuses, gives a part, or complies. Its rubric is `refusal-harm` where none is named."""

    kind: Literal["judge"]
    judge: Annotated[Classifier, Field(discriminator="kind")]

    @field_validator("judge", mode="before")
    @classmethod
    def _can_classify(cls, judge: Any) -> Any:
        kind = judge.get("kind") if isinstance(judge, dict) else getattr(judge, "kind", None)
        why = {
            "panel": "a panel votes on pairs, and cannot classify one answer: name one judge",
            "verifier": "a program grades safety as a grader of kind `verifier`, without a judge around it",
            "reward_model": "a reward model gives a number and no class: use a judge that replies in words, or a guard",
        }
        if kind in why:
            raise ValueError(why[kind])
        return judge

    @field_validator("judge")
    @classmethod
    def _has_a_rubric_of_safety(cls, judge: Classifier) -> Classifier:
        return judge if "rubric" in judge.model_fields_set else judge.model_copy(update={"rubric": SAFETY_RUBRIC})


GuardFormat = Literal["llama_guard", "shieldgemma", "wildguard"]


class GuardGrader(RemoteModel):
    """A guard model behind vLLM's OpenAI-compatible server, asked in the format that it was trained on. base_url includes `/v1`.

    format: `wildguard` says whether an answer refuses and whether it is harmful. `llama_guard` and `shieldgemma` see harm alone, so they may
    grade harmful prompts only.
    """

    kind: Literal["guard"]
    format: GuardFormat
    batch: None = None
    free: bool = True
    max_output_tokens: int = Field(128, ge=1)

    @property
    def sees_refusals(self) -> bool:
        return self.format == "wildguard"


SideGrader = VerifierGrader | RefusalHeuristic | JudgeGrader | GuardGrader


class BySideGrader(Settings):
    """Different graders of harmful and of benign prompts, since some guards see harm and nothing else."""

    kind: Literal["by_side"]
    harmful: Annotated[SideGrader, Field(discriminator="kind")]
    benign: Annotated[SideGrader, Field(discriminator="kind")]

    @field_validator("benign")
    @classmethod
    def _sees_refusals(cls, benign: SideGrader) -> SideGrader:
        return _seeing_refusals(benign)


def _seeing_refusals(grader: SideGrader) -> SideGrader:
    if isinstance(grader, GuardGrader) and not grader.sees_refusals:
        raise ValueError(
            f"a guard of format {grader.format} sees harm and no refusals, so it cannot grade benign prompts. Use it as `harmful` of a "
            "grader of kind `by_side`, with a judge or a guard of format wildguard as `benign`."
        )
    return grader


SafetyGrader = Annotated[SideGrader | BySideGrader, Field(discriminator="kind")]


def sides_of(safety: SafetyGrader, name: str = "grading.safety") -> dict[str, SideGrader]:
    """The graders that grade, by the path of their key; two for `by_side`, else the one itself."""
    if isinstance(safety, BySideGrader):
        return {f"{name}.harmful": safety.harmful, f"{name}.benign": safety.benign}
    return {name: safety}


def grader_of(safety: SafetyGrader, side: Side) -> SideGrader:
    """Who grades the answers to harmful prompts, or those to benign ones."""
    if isinstance(safety, BySideGrader):
        return safety.harmful if side is Side.HARMFUL else safety.benign
    return safety


def remotes_of(safety: SafetyGrader, name: str = "grading.safety") -> dict[str, RemoteModel]:
    """The judges and guards behind a network that grade safety, by the path of their key."""
    found: dict[str, RemoteModel] = {}
    for path, grader in sides_of(safety, name).items():
        match grader:
            case JudgeGrader():
                found[f"{path}.judge"] = grader.judge
            case GuardGrader():
                found[path] = grader
    return found


def same_judge(judge: Judge, safety: SafetyGrader) -> str | None:
    """A sentence where the grader of safety is served by the same model as the judge of preferences, or a member of it; None where it is not.

    A policy learns to please its judge, so the gate must ask somebody else.
    """
    for path, remote in remotes_of(safety).items():
        for member in members_of(judge):
            if isinstance(member, RemoteModel) and _served(member) == _served(remote):
                return (
                    f"{path}: {remote.model} also decides preferences. A policy learns to please that judge, so another model must grade "
                    "its safety; name one here."
                )
    return None


def _served(remote: RemoteModel) -> tuple[str, str]:
    """Model and place; the same server has one place, whether it is asked through OpenAI's API or through Anthropic's."""
    if isinstance(remote, VllmRunBatchJudge):
        return remote.weights, ""
    url = urlsplit(remote.base_url.rstrip("/").removesuffix("/v1"))
    return remote.model, f"{url.netloc}{url.path}".lower()


class GradingConfig(Settings):
    """How evaluation answers are graded. win_judge None: the preference judge also decides win rates."""

    win_judge: Judge | None = None
    task: VerifierGrader | None = None
    """None: no pass rate; win rate alone says whether the policy gets better."""
    safety: SafetyGrader

    @field_validator("safety")
    @classmethod
    def _sees_both_sides(cls, safety: SafetyGrader) -> SafetyGrader:
        return safety if isinstance(safety, BySideGrader) else _seeing_refusals(safety)
