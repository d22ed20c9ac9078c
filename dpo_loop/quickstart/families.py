"""Ordinary tasks of the tiny world. A program can check each: the text of a prompt says what is asked and what is right.

Every prompt reads `<instruction>: <items>`, and an instruction belongs to one family, so nothing but the text is needed to grade an
answer. Each family also knows how a careless writer gets it wrong: demonstrations contain such mistakes on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

_WORDS = """
amber bird boat book cloud coral crow deer drum fern fish flint fox gate glass grape
hill iron jar kite lake lamp leaf moon oak owl pearl pond rain rose sand star
"""
WORDS = tuple(_WORDS.split())
Items = tuple[str, ...]
Answer = Callable[[str, Items], str]
"""(instruction, items) → text"""


@dataclass(frozen=True, slots=True)
class Family:
    """instructions: how it is asked. sizes: how many items. mistakes: typical wrong answers; one that happens to be right is not used."""

    name: str
    instructions: tuple[str, ...]
    sizes: tuple[int, ...]
    right: Answer
    mistakes: tuple[Answer, ...]
    of_numbers: bool = False


def _times(instruction: str) -> int:
    return int(next(word for word in instruction.split() if word.isdigit()))


def _repeated(items: Items, times: int) -> str:
    return " ".join(items * times)


def _joined(items: Items) -> str:
    return " ".join(items)


FAMILIES = (
    Family("say", ("say", "please say", "write down"), (2, 3), lambda _, x: _joined(x), (
        lambda _, x: _joined(x[::-1]),
        lambda _, x: _joined(x[:-1]),
    )),
    Family("sort", ("sort", "put in order", "from a to z"), (2, 3), lambda _, x: _joined(tuple(sorted(x))), (
        lambda _, x: _joined(tuple(sorted(x, reverse=True))),
        lambda _, x: _joined(x),
    )),
    Family("reverse", ("reverse", "say backwards", "turn around"), (2, 3), lambda _, x: _joined(x[::-1]), (
        lambda _, x: _joined(x),
        lambda _, x: _joined((*x[1:], x[0])),
    )),
    Family("upper", ("in upper case", "shout", "in capitals"), (2, 3), lambda _, x: _joined(x).upper(), (
        lambda _, x: _joined(x),
        lambda _, x: _joined((*x[:-1], x[-1].upper())),
    )),
    Family("first", ("first word", "which is first", "the first of"), (3, 4), lambda _, x: x[0], (
        lambda _, x: x[-1],
        lambda _, x: x[1],
    )),
    Family("last", ("last word", "which is last", "the last of"), (3, 4), lambda _, x: x[-1], (
        lambda _, x: x[0],
        lambda _, x: x[-2],
    )),
    Family("count", ("count", "how many words", "number of words"), (2, 3, 4, 5), lambda _, x: str(len(x)), (
        lambda _, x: str(len(x) + 1),
        lambda _, x: str(len(x) - 1),
    )),
    Family("repeat", ("repeat 2 times", "repeat 3 times", "say it 2 times"), (2, 3), lambda how, x: _repeated(x, _times(how)), (
        lambda how, x: _repeated(x, _times(how) + 1),
        lambda _, x: _joined(x),
    )),
    Family("largest", ("largest number", "the biggest of", "which is most"), (2, 3), lambda _, x: max(x, key=int), (
        lambda _, x: min(x, key=int),
        lambda _, x: x[-1],
    ), of_numbers=True),
    Family("join", ("join with dashes", "put dashes between", "link with dashes"), (2, 3), lambda _, x: "-".join(x), (
        lambda _, x: _joined(x),
        lambda _, x: "+".join(x),
    )),
)  # fmt: skip
_FAMILY_OF = {instruction: family for family in FAMILIES for instruction in family.instructions}


@dataclass(frozen=True, slots=True)
class Task:
    family: Family
    instruction: str
    items: Items

    @property
    def text(self) -> str:
        return f"{self.instruction}: {_joined(self.items)}"

    @property
    def key(self) -> str:
        """Equal for two wordings of one task, which therefore belong to the same part of the world."""
        return f"{self.family.name}: {_joined(self.items)}"

    @property
    def right(self) -> str:
        return self.family.right(self.instruction, self.items)

    @property
    def tags(self) -> dict[str, str]:
        return {"family": self.family.name, "category": self.family.name}


def draw_task(rng: Random) -> Task:
    """Families come equally often; the items of a task differ from one another, so that every mistake shows."""
    family = rng.choice(FAMILIES)
    size = rng.choice(family.sizes)
    items = tuple(str(n) for n in rng.sample(range(10, 100), size)) if family.of_numbers else tuple(rng.sample(WORDS, size))
    return Task(family=family, instruction=rng.choice(family.instructions), items=items)


def wrong_answer(task: Task, rng: Random) -> str:
    """A careless answer that is not the right one."""
    mistakes = [mistake(task.instruction, task.items) for mistake in task.family.mistakes]
    wrong = [answer for answer in mistakes if answer != task.right]
    # Both mistakes can be right by chance (two words that are in order already); saying the items twice is wrong in every family.
    return rng.choice(wrong or [_joined(task.items + task.items)])


def read_task(text: str) -> Task | None:
    """The task that a prompt's text states; None if it is none of this world's."""
    instruction, colon, items = text.strip().partition(": ")
    family = _FAMILY_OF.get(instruction)
    return Task(family=family, instruction=instruction, items=tuple(items.split())) if colon and items.split() and family else None


def is_right(task: Task, answer: str) -> bool:
    """Exact but for white space around the answer."""
    return answer.strip() == task.right
