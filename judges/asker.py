"""Asking through the ledger: a call that was answered before is not made again, here or in any other process of the run."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_loop.types import Ballot, Prompt, Undecided, Verdict, canonical_json
from judges.backend import Backend, JudgeRequest, Reply
from judges.ballot import ballot_of
from judges.budget import Purse
from judges.ledger import Claim, Ledger
from judges.rubric import CLASSIFICATION
from judges.verdict import verdict_of
from judges.workers import all_of

KEY_VERSION = 1
LOOK_AGAIN_S = 0.2
"""How often a call that another process is making is looked at."""
LOOK_AGAIN_IN_WAVES_S = 5.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer that is judged. id: the completion's. is_whole: it ended by itself, and was not cut off at the most tokens allowed."""

    id: str
    text: str
    is_whole: bool = True


def question_of(
    identity: Mapping[str, Any], prompt: Prompt, left: str, right: str | None, replicate: int = 0, *, is_classified: bool = False
) -> dict[str, Any]:
    """What the key of a call is hashed from: who is asked how, and the texts in the order shown. Ids, run and API key are not in it,
    so the same question is the same call in every round."""
    material = {"prompt": [[m.model_dump() for m in prompt.messages], prompt.tags], "left": left, "right": right}
    bodies = {name: canonical_json(value).encode(errors="surrogatepass") for name, value in material.items()}
    hashes = {f"{name}_sha256": hashlib.sha256(body).hexdigest() for name, body in bodies.items()}
    asked = {"classification": CLASSIFICATION} if is_classified else {}
    return {"v": KEY_VERSION, **identity, **hashes, **asked, "replicate": replicate}


def key_of(question: Mapping[str, Any]) -> str:
    """64 hex digits; also the id under which a vendor sees the call."""
    return hashlib.sha256(canonical_json(question).encode()).hexdigest()


class Asker:
    """One judge with its ledger. Counts what it asked and what the ledger knew; keeps nothing else.

    `ask` returns a ballot for every comparison. Raises what the backend raises when going on is pointless: JudgeError, InputError,
    BudgetExceededError, JudgeUnavailableError.
    """

    def __init__(self, backend: Backend, ledger: Ledger, purse: Purse | None = None) -> None:
        """purse: whose figures are told with this judge's; a panel tells its own."""
        self._backend, self._ledger, self._purse = backend, ledger, purse
        self._under_way: dict[str, asyncio.Future[Reply]] = {}
        self.num_asked = 0
        self.num_known = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.cost_usd: float | None = 0.0
        """None as soon as one call's price is unknown: a sum of what is known would read like a total."""
        self.undecided: Counter[str] = Counter()

    @property
    def concurrency(self) -> int:
        return self._backend.spec.concurrency

    @property
    def in_waves(self) -> bool:
        return self._backend.spec.in_waves

    async def ask(self, prompt: Prompt, left: Candidate, right: Candidate, *, replicate: int = 0) -> Ballot:
        return await self._look(prompt, left, right, replicate)

    async def grade(self, prompt: Prompt, answer: Candidate, *, replicate: int = 0) -> Ballot:
        return await self._look(prompt, answer, None, replicate)

    async def classify(self, prompt: Prompt, answer: Candidate, *, replicate: int = 0) -> Ballot:
        """What the answer does with its request: refuse, give a part, comply."""
        return await self._look(prompt, answer, None, replicate, is_classified=True)

    async def _look(
        self, prompt: Prompt, left: Candidate, right: Candidate | None, replicate: int, *, is_classified: bool = False
    ) -> Ballot:
        right_text, right_id = (None, None) if right is None else (right.text, right.id)
        identity = self._backend.spec.identity
        question = question_of(identity, prompt, left.text, right_text, replicate, is_classified=is_classified)
        key = key_of(question)
        request = JudgeRequest(key=key, prompt=prompt, left=left.text, right=right_text, is_classified=is_classified)
        reply = await (self._instant(request, question) if self._backend.spec.is_instant else self._once(request, question))
        if isinstance(reply.outcome, Undecided):
            self.undecided[reply.outcome.reason.value] += 1
        return ballot_of(key, prompt=prompt, left_id=left.id, right_id=right_id, judge=self._backend.spec, reply=reply)

    async def both_orders(
        self, prompt: Prompt, one: Candidate, other: Candidate, *, replicate: int = 0
    ) -> tuple[Verdict, tuple[Ballot, ...]]:
        """The verdict between two answers, from a ballot in each order: the only way to a label."""
        looks = [
            lambda: self.ask(prompt, one, other, replicate=replicate),
            lambda: self.ask(prompt, other, one, replicate=replicate),
        ]
        first, second = await all_of(looks, at_once=self.in_waves)
        return verdict_of(first, second), (first, second)

    def figures(self) -> dict[str, Any]:
        return {
            "judge": self._backend.spec.name,
            "calls_asked": self.num_asked,
            "calls_from_ledger": self.num_known,
            "undecided_calls": dict(sorted(self.undecided.items())),
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cost_usd": self.cost_usd,
        } | ({"budget": self._purse.figures()} if self._purse else {})

    # ------------------------------------------------------------------------------------------------------------ one call

    async def _instant(self, request: JudgeRequest, question: Mapping[str, Any]) -> Reply:
        if known := self._ledger.find(request.key):
            self.num_known += 1
            return known
        reply = await self._backend.ask(request)
        self.num_asked += 1
        self._ledger.keep(request.key, question, reply)
        return reply

    async def _once(self, request: JudgeRequest, question: Mapping[str, Any]) -> Reply:
        """Two tasks that ask the same at the same time share one call (candidate against a previous policy that is the anchor)."""
        while under_way := self._under_way.get(request.key):
            await asyncio.wait([under_way])
            if not under_way.cancelled():
                self.num_known += 1
                return under_way.result()
        mine: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._under_way[request.key] = mine
        try:
            reply = await self._claimed(request, question)
            mine.set_result(reply)
            return reply
        finally:
            mine.cancel()
            del self._under_way[request.key]

    async def _claimed(self, request: JudgeRequest, question: Mapping[str, Any]) -> Reply:
        while True:
            if known := self._ledger.find(request.key):  # reading locks nobody out, claiming does
                self.num_known += 1
                return known
            try:
                claim = await self._ledger.claim(request.key, question)
            except asyncio.CancelledError:
                self._ledger.release(request.key, "cancelled")  # the claim is made although nobody waits for it
                raise
            match claim:
                case Reply() as known:
                    self.num_known += 1
                    return known
                case Claim.MINE:
                    return await self._paid(request)
                case Claim.THEIRS:
                    await asyncio.sleep(LOOK_AGAIN_IN_WAVES_S if self.in_waves else LOOK_AGAIN_S)

    async def _paid(self, request: JudgeRequest) -> Reply:
        try:
            reply = await self._backend.ask(request)
        except BaseException as error:
            self._ledger.release(request.key, f"{type(error).__name__}: {error}")
            raise
        await self._ledger.settle(request.key, reply)
        self.num_asked += 1
        self.input_tokens += reply.usage.input_tokens
        self.output_tokens += reply.usage.output_tokens
        self.cost_usd = None if self.cost_usd is None or reply.cost_usd is None else self.cost_usd + reply.cost_usd
        return reply
