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
from collections.abc import Iterable

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
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts: set[Words] = set()
        self._num_grams: list[int] = []
        """Of each text, less a template's."""
        self._having: defaultdict[Words, list[int]] = defaultdict(list)
        """8-gram → the texts that have it, by number"""
        for words in map(_words, texts):
            if words in self._texts:
                continue
            self._texts.add(words)
            grams = _grams(words)
            for gram in grams:
                self._having[gram].append(len(self._num_grams))
            self._num_grams.append(len(grams))
        limit = max(_TEMPLATE_TEXTS, _TEMPLATE_SHARE * len(self._num_grams))
        self._template = {gram for gram, numbers in self._having.items() if len(numbers) > limit}
        for gram in self._template:
            for number in self._having.pop(gram):
                self._num_grams[number] -= 1

    def overlaps(self, text: str) -> bool:
        """Whether a text of the corpus is nearly this one, holds it or is held by it."""
        words = _words(text)
        if words in self._texts:
            return True
        grams = _grams(words) - self._template
        shared = Counter(number for gram in grams for number in self._having.get(gram, ()))
        return any(10 * num >= 7 * min(len(grams), self._num_grams[number]) for number, num in shared.items())


def _words(text: str) -> Words:
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_INVISIBLE)
    return tuple(_WORD.findall(folded)) or tuple(folded.split())  # a text of signs only is its signs


def _grams(words: Words) -> set[Words]:
    return {words[start : start + _GRAM] for start in range(len(words) - _GRAM + 1)}
