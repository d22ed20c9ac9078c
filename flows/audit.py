"""From a pair back to every raw reply that made it: `dpo-loop show RUN --pair ID`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_loop.artifacts import read_manifest
from dpo_loop.errors import InputError
from dpo_loop.exchange import read_ballots, read_completions, read_judgements, read_pairs, read_prompts
from dpo_loop.layout import RoundDir, RunDir
from dpo_loop.types import Ballot, PromptJudgement
from judges.ledger import Ledger


def audit(run: RunDir, name: str, round_number: int | None = None) -> dict[str, Any]:
    """What is known about the comparison of a prompt, as JSON. name: id of the prompt or of either completion, or the beginning of one.

    round_number None: the latest round that has it. Raises InputError if none has, or if several prompts begin so.
    """
    rounds = [run.round(round_number)] if round_number is not None else list(reversed(run.rounds()))
    for here in rounds:
        if read_manifest(here.stage("judge")) is None:
            continue
        found = [judgement for judgement in read_judgements(here.stage("judge")) if _is_meant(judgement, name)]
        if len(found) > 1:
            raise InputError(f"{len(found)} prompts of round {here.number} have an id that begins with {name}; give more of it")
        if found:
            return _told(run, here, found[0])
    where = "no round" if round_number is None else f"round {round_number} has not"
    raise InputError(f"{where} judged {name}; ids stand in pairs.jsonl and judgements.jsonl of a round's stages")


def _is_meant(judgement: PromptJudgement, name: str) -> bool:
    ids = (judgement.prompt_id, judgement.best_id or "", judgement.worst_id or "")
    return bool(name) and any(known.startswith(name) for known in ids)


def _told(run: RunDir, here: RoundDir, judgement: PromptJudgement) -> dict[str, Any]:
    prompt = next(p for p in read_prompts(here.stage("prompts")) if p.id == judgement.prompt_id)
    texts = {c.id: c.text for c in read_completions(here.stage("generate")) if c.prompt_id == prompt.id}
    verdict = judgement.verdict
    ballots = [b for b in read_ballots(here.stage("judge")) if b.prompt_id == prompt.id]
    final = set(verdict.ballot_keys) if verdict else set()
    pair = None
    if read_manifest(here.stage("pair")) is not None:
        pair = next((p for p in read_pairs(here.stage("pair")) if p.prompt_id == prompt.id), None)
    with Ledger(run.ledger) as ledger:
        rows = ledger.rows(ballot.key for ballot in ballots)
    return {
        "round": here.number,
        "prompt_id": prompt.id,
        "prompt": [message.model_dump() for message in prompt.messages],
        "answers": texts,
        "verdict": verdict and verdict.model_dump(mode="json"),
        "why_no_verdict": judgement.why,
        "pair": pair and {"chosen_id": pair.chosen_id, "rejected_id": pair.rejected_id, "margin": pair.margin},
        "ballots": [
            {
                "makes_the_label": ballot.key in final,
                **ballot.model_dump(mode="json"),
                "times_asked": rows[ballot.key].times_asked if ballot.key in rows else None,
                "question": rows[ballot.key].question if ballot.key in rows else None,
            }
            for ballot in sorted(ballots, key=lambda ballot: ballot.key in final)
        ],
    }


def lines_of(found: dict[str, Any]) -> Iterator[str]:
    """For people: the label last, after all that led to it."""
    yield f"round {found['round']}, prompt {found['prompt_id']}"
    for message in found["prompt"]:
        yield f"  {message['role']}: {message['content']}"
    for name, text in found["answers"].items():
        yield f"answer {name}: {text!r}"
    for ballot in map(Ballot.model_validate, ({k: v for k, v in b.items() if k in Ballot.model_fields} for b in found["ballots"])):
        told = next(b for b in found["ballots"] if b["key"] == ballot.key)
        purpose = "label" if told["makes_the_label"] else "selection"
        shown = ballot.left_id if ballot.right_id is None else f"{ballot.left_id} | {ballot.right_id}"
        cost = "price unknown" if ballot.cost_usd is None else f"${ballot.cost_usd:.6f}"
        yield f"ballot {ballot.key[:16]} ({purpose}) by {ballot.judge}, served by {ballot.served_model or 'nobody'}, asked {told['times_asked']} times"
        yield f"  shown: {shown}"
        yield f"  outcome: {ballot.outcome.model_dump(exclude_defaults=True)}"
        yield f"  raw reply: {ballot.raw!r}"
        yield f"  {ballot.usage.input_tokens} tokens in, {ballot.usage.output_tokens} out, {cost}, {ballot.latency_s:.2f} s, {ballot.attempts} attempts, request {ballot.request_id or 'unnamed'}"
    verdict, pair = found["verdict"], found["pair"]
    if verdict is None:
        yield f"no verdict: {found['why_no_verdict']}"
    else:
        yield f"verdict: {verdict['kind']}, winner {verdict['winner_id'] or 'none'}, margin {verdict['margin']:.3f}"
    yield (
        f"pair: chosen {pair['chosen_id']}, rejected {pair['rejected_id']}, margin {pair['margin']:.3f}"
        if pair
        else "no pair was made of it"
    )
