"""Whether two prompts are nearly the same question, so that what evaluates is not trained on.

Two texts *overlap* if their words are equal, or if one of them holds at least 70 % of the other's word 8-grams. 70 % of 8-grams is PaLM's
rule (arXiv 2204.02311, section 8). Two things are ours:

- It is asked of one text and another, in both directions, not of one text and all others together: pieces that several prompts
  have in common do not add up to a copy, a question inside a longer one is found, and what was found before training is what is found after it.
- An 8-gram that more than 5 % of the corpus (and more than ten of its texts) have is a template's, such as "below is an instruction that
  describes a task": it counts for nothing, or every prompt written on one template would be a copy of every other.

Case, Unicode variants, punctuation and white space are no difference. A sign of arithmetic is one: `2 + 3` and `2 * 3` are two questions, and so are
`C++` and `C#`. Texts of fewer than 8 words are compared whole, as is a script that puts no space between words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain

from dpo_loop.types import Prompt

_GRAM = 8
_TEMPLATE_SHARE, _TEMPLATE_TEXTS = 0.05, 10
_OPERATOR = r"[-+*/%^=<>×÷]"
_WORD = re.compile(rf"\w+(?:\+\+|#)?|{_OPERATOR}(?=\s*\d)|(?<=\s){_OPERATOR}(?=\s)")
# Apostrophes, soft hyphens and signs of no width, which split a word for a program and not for a reader.
_INVISIBLE = dict.fromkeys([*map(ord, "'’\u00ad\u2060\ufeff"), *range(0x200B, 0x2010)])
Words = tuple[str, ...]


def asked(prompt: Prompt) -> str:
    """The text of a conversation without its system turn: the same question under other instructions is the same question."""
    return "\n".join(turn.content for turn in prompt.messages if turn.role != "system")


class Corpus:
    """Texts to find near copies of.

    What is a template follows from the corpus, so build it of the evaluation prompts, all of them, wherever training prompts are asked about:
    then the gate finds nothing in prompts that were chosen by the same corpus.

    Few of the texts that have an 8-gram in common with a prompt are looked at: of n 8-grams, a text that holds 70 % must hold one of any
    30 % and one more, so the rarest of them are looked up, and not what hundreds of texts have in common.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        texts_of: defaultdict[Words, list[str]] = defaultdict(list)
        for text in texts:
            texts_of[_words(text)].append(text)
        self._texts = list(texts_of.values())
        """By number: texts whose words are the same."""
        self._number = {words: number for number, words in enumerate(texts_of)}
        of_texts = [_grams(words) for words in texts_of]
        num_texts = Counter(chain.from_iterable(of_texts))
        limit = max(_TEMPLATE_TEXTS, _TEMPLATE_SHARE * len(of_texts))
        self._template = {gram for gram, num in num_texts.items() if num > limit}
        self._ids = {gram: id for id, gram in enumerate(gram for gram, num in num_texts.items() if num <= limit)}
        """Of each 8-gram that is no template's."""
        self._grams = [{self._ids[gram] for gram in grams - self._template} for grams in of_texts]
        self._having: defaultdict[int, list[int]] = defaultdict(list)
        """8-gram → the texts that have it, by number"""
        for number, ids in enumerate(self._grams):
            for id in ids:
                self._having[id].append(number)
        self._marked_by: defaultdict[int, list[int]] = defaultdict(list)
        """8-gram → the texts among whose rarest it is: they hold at least one that a longer text must have to hold them"""
        for number, ids in enumerate(self._grams):
            for id in self._rarest(ids, num_grams=len(ids)):
                self._marked_by[id].append(number)
        self._first_of: dict[Words, str | None] = {}

    def overlaps(self, text: str) -> bool:
        """Whether a text of the corpus is nearly this one, holds it or is held by it."""
        return self.overlapped(text) is not None

    def overlapped(self, text: str) -> str | None:
        """The text of the corpus that is nearly this one, holds it or is held by it, as it was given; the first such, None where there is none."""
        words = _words(text)
        if words not in self._first_of:
            self._first_of[words] = next(self._overlapping(words), None)
        return self._first_of[words]

    def all_overlapped(self, text: str) -> Iterator[str]:
        """Every text of the corpus that is nearly this one, holds it or is held by it, as it was given."""
        return self._overlapping(_words(text))

    def _overlapping(self, words: Words) -> Iterator[str]:
        same = self._number.get(words)
        if same is not None:
            yield from self._texts[same]
        grams = _grams(words) - self._template
        known = {self._ids[gram] for gram in grams if gram in self._ids}
        for number in self._worth_a_look(known, num_grams=len(grams)):
            having = self._grams[number]
            if number != same and len(known & having) >= _enough(min(len(grams), len(having))):
                yield from self._texts[number]

    def _worth_a_look(self, known: set[int], *, num_grams: int) -> list[int]:
        """Numbers, in order, of all texts that can hold enough of so many 8-grams, of which the corpus has those that are `known`; or be held."""
        holding = (number for id in self._rarest(known, num_grams=num_grams) for number in self._having[id])
        held = (number for id in known if id in self._marked_by for number in self._marked_by[id])
        return sorted({*holding, *held})

    def _rarest(self, known: set[int], *, num_grams: int) -> list[int]:
        """So many of the rarest that one of them is in every text that has enough; 8-grams that no text has are the rarest of all."""
        num = num_grams - _enough(num_grams) + 1 - (num_grams - len(known))
        return sorted(known, key=lambda id: len(self._having[id]))[:num] if num > 0 else []


def _enough(num_grams: int) -> int:
    """The least number that is at least 70 % of them."""
    return -(-7 * num_grams // 10)


def _words(text: str) -> Words:
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_INVISIBLE)
    return tuple(_WORD.findall(folded)) or tuple(folded.split())  # a text of signs only is its signs


def _grams(words: Words) -> set[Words]:
    return {words[start : start + _GRAM] for start in range(len(words) - _GRAM + 1)}
