"""The model card of an export: what it is, how it was trained, what the gate said of it, and what none of this shows.

Figures come from the run's files; what a model wrote is never in it. Text that people chose (names, reasons, prompt sets) is escaped, so that it is
read as text by whatever renders Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dpo_loop.config import METRIC_NAMES, WIN_RATES, SftConfig, TrainingConfig
from dpo_loop.reporting.page import TEMPLATES
from dpo_loop.reporting.text import interval, percent, points, visible
from dpo_loop.types import CheckResult, GateReport, HumanDecision, PolicyRef, PromptSet, RoundSummary

What = Literal["adapter", "merged", "pairs"]
TEMPLATE = "MODEL_CARD.md.j2"
UNKNOWN_LICENCE = "other"
_TAGS = ("dpo", "dpo-loop", "preference-optimization")
_PEFT_TAGS = ("lora", "peft")
_SPECIAL = re.compile(r"[\\`*_\[\]<>#|~$&@]|(?<=:)/(?=/)|(?<=www)\.|^[-+=](?=\s|$)|^\d+(?=[.)](?:\s|$))", re.IGNORECASE)
"""What Markdown, GitHub's and the hub's, takes for markup, mention, formula, link or list."""
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter is put on, and a merged model made from."""

    name: str
    """Hub id, or the name of a directory."""
    hub_id: str | None
    """None: nobody else can load it by its name."""
    is_fine_tuned: bool = False
    """Whether it is not `name` itself but what the run made of it by SFT, which nobody else has either."""


@dataclass(frozen=True, slots=True)
class Sft:
    """How round 0 made the start policy; figures as the `seed` stage recorded them."""

    config: SftConfig
    num_demonstrations: int | None
    figures: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TrainedRound:
    """One row of the training table; figures as the `train` stage recorded them."""

    round: int
    num_pairs: int | None
    figures: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CardFacts:
    """All that a card says. The lineage ends with the round that it is about."""

    run_id: str
    round: int
    what: What
    base: Base
    policy: PolicyRef
    licence: str
    """Identifier of the base's licence; UNKNOWN_LICENCE where nobody said."""
    blessed: bool
    training: TrainingConfig
    judge: str
    safety_judge: str
    lineage: tuple[RoundSummary, ...]
    sft: Sft | None = None
    trained: tuple[TrainedRound, ...] = ()
    gate: GateReport | None = None
    alpha: float = 0.05
    """Of one look of the gate."""
    report_sha256: str | None = None
    decision: HumanDecision | None = None
    forced: Mapping[str, str] | None = None
    """Of an export without a blessing: reviewer, reason, at."""
    rounds_of_pairs: tuple[int, ...] = ()
    pool: PromptSet | None = None
    """Of pairs: where their prompts come from."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Of the export itself: how a merge was checked, how many pairs there are."""

    @property
    def name(self) -> str:
        return f"{self.run_id}-pairs" if self.what == "pairs" else f"{self.run_id}-round-{self.round}"

    @property
    def confidence(self) -> str:
        return f"{round(100 * (1 - self.alpha), 2):g} %"

    @property
    def loss_settings(self) -> dict[str, Any]:
        """Beta, and what is not as it usually is."""
        loss = self.training.loss
        return {"beta": loss.beta} | loss.model_dump(exclude={"kind", "beta"}, exclude_defaults=True)

    @property
    def has_held_out(self) -> bool:
        return any(row.figures.get("held_out") for row in self.trained)

    @property
    def rates(self) -> dict[str, dict[str, float | None]]:
        """policy → rate name → value in 0..1; of round 0, which has no gate, what its own evaluation found."""
        if self.gate is not None:
            return {
                policy: {name: rates[name] for name in METRIC_NAMES if name in rates} for policy, rates in self.gate.rates.items()
            }
        own = self.lineage[-1].model_dump() if self.lineage else {}
        return {"candidate": {name: own[name] for name in METRIC_NAMES if own.get(name) is not None}}


def render_card(facts: CardFacts) -> str:
    """Markdown with the YAML that the hub reads. Nothing is asked of the network."""
    from huggingface_hub import ModelCard

    body = (
        _environment().get_template(TEMPLATE).render(facts=facts, gate=facts.gate, own=facts.lineage[-1] if facts.lineage else None)
    )
    # The body goes in as a value: a template of it would run what people wrote between braces.
    card = ModelCard.from_template(_metadata(facts), template_str="---\n{{ card_data }}\n---\n\n{{ body }}", body=body)
    return str(card.content).rstrip() + "\n"


def _metadata(facts: CardFacts) -> Any:
    from huggingface_hub import ModelCardData

    licence_name = "see-the-base-model" if facts.licence == UNKNOWN_LICENCE else None
    if facts.what == "pairs":
        return ModelCardData(license=facts.licence, license_name=licence_name, tags=list(_TAGS))
    adapter = facts.what == "adapter"
    # The hub lists an adapter below its base, and takes a name that it does not know for a model of its own.
    base_model = None if adapter and facts.base.is_fine_tuned else facts.base.hub_id
    relation = "adapter" if adapter else "finetune"
    return ModelCardData(
        license=facts.licence,
        license_name=licence_name,
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*_TAGS, *(_PEFT_TAGS if adapter else ())],
        model_name=facts.name,
        eval_results=_eval_results(facts),
    )


def _eval_results(facts: CardFacts) -> list[Any] | None:
    """The candidate's own rates. None, not an empty list, where there are none: the hub's format knows no empty index."""
    from huggingface_hub import EvalResult

    rates = {name: value for name, value in facts.rates.get("candidate", {}).items() if value is not None}
    own = facts.lineage[-1] if facts.lineage else None
    if own is not None:
        wins = {"win_rate_previous": own.win_rate_previous, "win_rate_anchor": own.win_rate_anchor}
        rates |= {name: value for name, value in wins.items() if value is not None}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="dpo-loop-evaluation",
            dataset_name=f"evaluation prompts of run {facts.run_id}",
            metric_type=name,
            metric_name=METRIC_NAMES.get(name, name.replace("_", " ").replace("rate ", "rate against ")),
            metric_value=round(value, 6),
        )
        for name, value in rates.items()
    ] or None


def _environment() -> Environment:
    """Every value is escaped, unless it is Markup."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,  # not HTML: `finalize` escapes for Markdown
        finalize=lambda value: value if isinstance(value, Markup) else markdown(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": percent,
        "points": points,
        "code": code,
        "number": _number,
        "metric": lambda name: METRIC_NAMES.get(name, name),
        "rule": rule_of,
        "change": lambda check: _change(check, check.delta),
        "interval": _interval,
        "measured": lambda value, check: _number(value) if check.metric == "perplexity" else percent(value),
        "words": lambda name: str(name).replace("_", " "),
    }
    return made


def rule_of(check: CheckResult) -> str:
    """A check as a sentence that holds when it passes."""
    name = METRIC_NAMES.get(check.metric, check.metric) + (f" of {check.task}" if check.task else "")
    unit = {"perplexity": " %", "capability": ""}.get(check.metric, " points")  # a capability that was not measured has no unit yet
    against = f" against {check.vs}" if check.vs else ""
    match check.rule:
        case "non_inferior":
            reference = f"an even match{against}" if check.metric in WIN_RATES else check.vs
            return f"{name} no worse than {reference} by more than {100 * check.margin:.1f}{unit}"
        case "ceiling":
            return f"{name} stays below {percent(check.margin)}"
        case "floor":
            return f"{name}{against} stays above {percent(check.margin)}"
        case "veto":
            return f"in no category {_counted(check)} with new {name}{against}"
        case _:
            return f"{name} {check.rule}{against} {percent(check.margin)}"


def _counted(check: CheckResult) -> str:
    num = round(check.margin * check.num_prompts)  # a veto's margin is a number of prompts, as a share of those watched
    return "a prompt" if num <= 1 else f"{num} prompts"


def _change(check: CheckResult, value: float | None) -> str:
    """Signed: percentage points; of perplexity percent, relatively."""
    return points(value) + (" %" if check.metric == "perplexity" and value is not None else "")


def _interval(check: CheckResult) -> str:
    if check.ci_low is None or check.ci_high is None:
        return "–"
    if check.delta is None:
        return interval((check.ci_low, check.ci_high))
    return f"{points(check.ci_low)} to {_change(check, check.ci_high)}"


def _number(value: Any) -> str:
    told = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"^-(?=\d)", "−", told)


def markdown(text: str) -> str:
    """One line of text that Markdown renders as it is: no markup, no HTML, no link, no table cell of its own."""
    return _SPECIAL.sub(lambda match: _escaped(match[0]), _SPACE.sub(" ", visible(text)))


def _escaped(special: str) -> str:
    entity = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;", "/": "&#47;", ".": "&#46;"}
    return entity.get(special) or (special + "\\" if special.isdigit() else "\\" + special)


def code(text: str) -> Markup:
    """An inline code span, in which nothing but its own fence means anything; a table still reads a bar in it."""
    plain = _SPACE.sub(" ", visible(text)).replace("|", "¦")
    fence = "`" * (max((len(run) for run in re.findall("`+", plain)), default=0) + 1)
    return Markup(f"{fence} {plain} {fence}" if "`" in plain else f"{fence}{plain}{fence}")
