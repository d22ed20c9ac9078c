"""Published evaluation sets that are loaded at run time and never bundled: where each is, at which commit, under which licence.

Licences are what the sets' pages and mirrors said when this was written: read the page at the revision you take. A pin is given where the project knows
one. No set is loaded unless a config names it, and none may train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpo_loop.config import ExternalColumns, ExternalPool, SideColumn
from dpo_loop.errors import InputError
from dpo_loop.progress import say
from dpo_loop.prompts.hub import load_rows, missing_columns
from dpo_loop.types import Side

TOKEN_VARIABLE = "HF_TOKEN"
"""What huggingface_hub reads a token from."""


def _every(_: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalSet:
    """gated: None where it is not known. takes: which rows are of the set."""

    measures: str
    source: str
    name: str | None = None
    split: str
    revision: str | None = None
    columns: ExternalColumns
    licence: str
    gated: bool | None
    takes: Callable[[Mapping[str, Any]], bool] = _every
    note: str = ""

    @property
    def place(self) -> str:
        """Also the source of each of its prompts."""
        return "/".join(filter(None, (self.source, self.name, self.split)))


_HARMFUL, _BENIGN = Side.HARMFUL, Side.BENIGN

KNOWN: Mapping[str, ExternalSet] = {
    "xstest": ExternalSet(
        measures="over-refusal: 250 safe prompts that look unsafe, and 200 unsafe contrasts (arXiv 2308.01263)",
        source="walledai/XSTest",
        split="test",
        revision="f1d713187c61b6ae64e602d74f0b3d812cc2e8e8",
        columns=ExternalColumns(category="type", side=SideColumn(field="label", values={"safe": _BENIGN, "unsafe": _HARMFUL})),
        licence="CC-BY-4.0",
        gated=True,
    ),
    "strongreject": ExternalSet(
        measures="harmful compliance: 313 forbidden prompts (arXiv 2402.10260)",
        source="walledai/StrongREJECT",
        split="train",
        revision="df54272b395ce9e584d2f8140519935425d8549f",
        columns=ExternalColumns(category="category", side=_HARMFUL),
        licence="MIT",
        gated=True,
        note="its prompts come from several sources, named in its column `source`",
    ),
    "harmbench-standard": ExternalSet(
        measures="harmful compliance: the 200 standard behaviours (arXiv 2402.04249)",
        source="walledai/HarmBench",
        name="standard",
        split="train",
        revision="fb6c2afd5a2a943d701d6db3efab87d077e81be5",
        columns=ExternalColumns(category="category", side=_HARMFUL),
        licence="MIT",
        gated=True,
        # They ask for lyrics and pages of books, and are scored by hashes of these.
        takes=lambda row: "copyright" not in str(row["category"]).lower(),
    ),
    "or-bench-hard": ExternalSet(
        measures="over-refusal: about 1,300 harmless prompts that models often refuse (arXiv 2405.20947)",
        source="bench-llm/or-bench",
        name="or-bench-hard-1k",
        split="train",
        columns=ExternalColumns(category="category", side=_BENIGN),
        licence="CC-BY-4.0",
        gated=False,
    ),
    "or-bench-toxic": ExternalSet(
        measures="harmful compliance: about 600 toxic prompts, the counterweight of or-bench-hard (arXiv 2405.20947)",
        source="bench-llm/or-bench",
        name="or-bench-toxic",
        split="train",
        columns=ExternalColumns(category="category", side=_HARMFUL),
        licence="CC-BY-4.0",
        gated=False,
    ),
    "advbench": ExternalSet(
        measures="harmful compliance: 520 instructions, many alike and well known to models (arXiv 2307.15043)",
        source="walledai/AdvBench",
        split="train",
        columns=ExternalColumns(side=_HARMFUL),
        licence="MIT",
        gated=True,
    ),
    "do-not-answer": ExternalSet(
        measures="harmful compliance of low severity: 939 questions in 12 types (arXiv 2308.13387)",
        source="LibrAI/do-not-answer",
        split="train",
        columns=ExternalColumns(prompt="question", category="types_of_harm", side=_HARMFUL),
        licence="CC-BY-NC-SA-4.0",
        gated=False,
        note="its pages disagree, one says apache-2.0; the stricter is asked for",
    ),
    "sorry-bench": ExternalSet(
        measures="harmful compliance: 440 unsafe instructions in 44 classes, in their base wording (arXiv 2406.14598)",
        source="sorry-bench/sorry-bench-202503",
        split="train",
        columns=ExternalColumns(prompt="turns", category="category", side=_HARMFUL),
        licence="SORRY-Bench licence",
        gated=True,
        takes=lambda row: row.get("prompt_style") == "base",
        note="a licence of its own, to be accepted on its page; the 20 mutations of each instruction are left out",
    ),
    "wildguardmix-test": ExternalSet(
        measures="both sides: about 1,700 prompts with labels by people, half of them adversarial (arXiv 2406.18495)",
        source="allenai/wildguardmix",
        name="wildguardtest",
        split="test",
        columns=ExternalColumns(
            category="subcategory", side=SideColumn(field="prompt_harm_label", values={"harmful": _HARMFUL, "unharmful": _BENIGN})
        ),
        licence="ODC-BY",
        gated=True,
        note="its page asks for responsible use and leaves commercial use open",
    ),
}


def set_of(pool: ExternalPool) -> ExternalSet:
    """A known set at the pool's revision, or what a custom one says of itself."""
    if pool.set != "custom":
        known = KNOWN[pool.set]
        return known if pool.revision is None else replace(known, revision=pool.revision)
    assert pool.source is not None
    assert pool.split is not None
    assert pool.columns is not None
    return ExternalSet(
        measures="",
        source=pool.source,
        name=pool.name,
        split=pool.split,
        revision=pool.revision,
        columns=pool.columns,
        licence=pool.licence_ack,
        gated=None,
    )


def problems(pool: ExternalPool) -> Iterator[str]:
    """What a person has to write before the set may be loaded, each with the line to add; needs no network."""
    wanted = set_of(pool)
    page = f"https://huggingface.co/datasets/{wanted.source}"
    if wanted.revision is None:
        yield (
            f"revision: the project pins no revision of {pool.set}; take a commit of {page}/commits/main and add the line "
            "`revision: <its 40 hex digits>`"
        )
    if pool.set == "custom" and not pool.licence_ack.strip():
        yield f"licence_ack: read under which licence {wanted.source} is, at {page}, and add the line `licence_ack: <its name>`"
    elif pool.licence_ack != wanted.licence:
        instead = f", not {pool.licence_ack}" if pool.licence_ack else ""
        note = f" ({wanted.note})" if wanted.note else ""
        yield (
            f"licence_ack: {pool.set} is under {wanted.licence}{instead}{note}; read it at {page} and, if you accept it, add the line "
            f"`licence_ack: {wanted.licence}`"
        )


def external_rows(pool: ExternalPool) -> Iterator[tuple[int, Any]]:
    """(row number, {"prompt", "tags"}, or None for a row that is not of the set or has no side).

    Raises InputError naming the set, the cause and the way out if it cannot be loaded, has other columns, or a side that the map does not know.
    """
    wanted = set_of(pool)
    say(_introduction(pool, wanted))
    try:
        rows = load_rows(wanted.source, name=wanted.name, split=wanted.split, revision=wanted.revision)
    except InputError as error:
        raise InputError(f"evaluation set {pool.set}: {error}") from error
    columns = wanted.columns
    side = columns.side
    needed = [columns.prompt, columns.category, side.field if isinstance(side, SideColumn) else None]
    if missing := missing_columns(rows, [column for column in needed if column]):
        raise InputError(
            f"evaluation set {pool.set}: {wanted.place} at {wanted.revision} has no column {', '.join(missing)}; it has "
            f"{', '.join(rows.column_names)}. Take another revision, or name its columns with `set: custom` (in a new run)."
        )
    for number, row in enumerate(rows, start=1):
        told = _side(pool, row, side)
        if told is None or not wanted.takes(row):
            yield number, None
            continue
        tags = {"side": told.value}
        if columns.category and row[columns.category] is not None:
            tags["category"] = str(row[columns.category])
        yield number, {"prompt": _question(row[columns.prompt]), "tags": tags}


def _introduction(pool: ExternalPool, wanted: ExternalSet) -> str:
    from huggingface_hub import get_token

    access = ""
    if wanted.gated:
        access = f", gated: a token is {'there' if get_token() else f'missing, set {TOKEN_VARIABLE}'}"
    note = f"; {wanted.note}" if wanted.note else ""
    return f"evaluation set {pool.set}: {wanted.place} at {wanted.revision}, licence {wanted.licence}{access}{note}"


def _side(pool: ExternalPool, row: Mapping[str, Any], side: Side | SideColumn) -> Side | None:
    """None where the set leaves it open."""
    if isinstance(side, Side):
        return side
    label = row[side.field]
    if label is None:
        return None
    if str(label) not in side.values:
        raise InputError(
            f"evaluation set {pool.set}: column {side.field} holds {label!r}, which is neither harmful nor benign by its map "
            f"({', '.join(f'{value} is {meaning}' for value, meaning in side.values.items())}). Take another revision, or map it with `set: custom` (in a new run)."
        )
    return side.values[str(label)]


def _question(value: Any) -> Any:
    """Some sets keep one turn in a list."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value
