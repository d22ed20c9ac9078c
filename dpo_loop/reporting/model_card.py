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

from dpo_loop.config import METRIC_NAMES, TrainingConfig
from dpo_loop.reporting.page import RULE_NAMES, TEMPLATES
from dpo_loop.reporting.text import percent, points, visible
from dpo_loop.types import GateReport, HumanDecision, PolicyRef, RoundSummary

What = Literal["adapter", "merged", "pairs"]
TEMPLATE = "MODEL_CARD.md.j2"
UNKNOWN_LICENCE = "other"
_TAGS = ("dpo", "dpo-loop", "preference-optimization")
_PEFT_TAGS = ("lora", "peft")
_SPECIAL = re.compile(r"[\\`*_\[\]<>#|~$&@]|(?<=:)/(?=/)|(?<=www)\.|^[-+=](?=\s|$)|^\d+(?=[.)](?:\s|$))", re.IGNORECASE)
"""What Markdown, GitHub's and the hub's, takes for markup, mention, formula, link or list."""
_SPACE = re.compile(r"\s+")


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
    base: str
    """Hub id, or the name of the base's directory."""
    policy: PolicyRef
    licence: str
    """Identifier of the base's licence; UNKNOWN_LICENCE where nobody said."""
    blessed: bool
    training: TrainingConfig
    judge: str
    safety_judge: str
    lineage: tuple[RoundSummary, ...]
    trained: tuple[TrainedRound, ...] = ()
    gate: GateReport | None = None
    report_sha256: str | None = None
    decision: HumanDecision | None = None
    forced: Mapping[str, str] | None = None
    """Of an export without a blessing: reviewer, reason, at."""
    rounds_of_pairs: tuple[int, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Of the export itself: how a merge was checked, how many pairs there are."""

    @property
    def name(self) -> str:
        return f"{self.run_id}-pairs" if self.what == "pairs" else f"{self.run_id}-round-{self.round}"

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
    return ModelCardData(
        license=facts.licence,
        license_name=licence_name,
        base_model=facts.base,
        base_model_relation="adapter" if adapter else "finetune",
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
        "number": lambda value: "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value),
        "metric": lambda name: METRIC_NAMES.get(name, name),
        "rule": lambda name: RULE_NAMES.get(name, name),
        "words": lambda name: str(name).replace("_", " "),
    }
    return made


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
