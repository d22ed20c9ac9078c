"""The judge stage as a whole: labels from both orders only, counts that add up, and outages that end it instead of the round."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_loop.artifacts import materialize, read_manifest
from dpo_loop.config import PairingConfig
from dpo_loop.errors import CorruptArtifactError, JudgeError, JudgeUnavailableError
from dpo_loop.exchange import completions_file, read_ballots, read_judgements
from dpo_loop.files import write_jsonl
from dpo_loop.pairing.stage import pair_all
from dpo_loop.types import Decided, FinishReason, Outcome, PreferencePair, Prompt, Undecided, UndecidedReason, VerdictKind
from judges.accounts import Accounts
from judges.asker import Asker, Candidate
from judges.config import VerifierJudge
from judges.figures import Figures, Judged
from judges.ledger import Ledger
from judges.stage import judge_prompts, judge_stage
from judges.verdict import verdict_of
from tests.judges.opinions import Opinion, Opinionated
from tests.judges.stub import Stub, chat, fails, says
from tests.judges.world import VERIFIER, make_completion, make_prompt, write_answers, write_prompts


def judged_by(opinion: Opinion, texts: list[list[str]], *, seed: int = 0, ledger: Path) -> tuple[list[Prompt], list[Judged]]:
    prompts = [make_prompt(f"Question {number}") for number in range(len(texts))]
    candidates = {
        prompt.id: [Candidate(make_completion(prompt, k, text).id, text) for k, text in enumerate(answers)]
        for prompt, answers in zip(prompts, texts, strict=True)
    }
    with Ledger(ledger) as book:
        asker = Asker(Opinionated(opinion), book)
        judged: list[Judged] = []
        asyncio.run(judge_prompts(asker, prompts, candidates, judged.append, seed=seed))
        return prompts, judged


def figures_of(judged: list[Judged]) -> Figures:
    figures = Figures()
    for item in judged:
        figures.add(item)
    return figures


def labels(prompts: list[Prompt], judged: list[Judged], texts: list[list[str]]) -> dict[str, tuple[str, str]]:
    """prompt id → (chosen, rejected) text of what pairing makes of it."""
    completions = [make_completion(p, k, text) for p, answers in zip(prompts, texts, strict=True) for k, text in enumerate(answers)]
    answers = {completion.id: completion for completion in completions}
    config = PairingConfig(min_margin=0.0, max_length_ratio=1_000.0)
    made = pair_all(prompts, [item.judgement for item in judged], answers, config)
    return {pair.prompt_id: (pair.chosen[0].content, pair.rejected[0].content) for pair in made if isinstance(pair, PreferencePair)}


texts_of_rounds = st.lists(st.lists(st.text("ab", min_size=1, max_size=3), max_size=6), max_size=5)
outcomes = st.one_of(
    st.sampled_from([0.0, 0.5, 1.0]).map(lambda p: Decided(p_left=p)),
    st.sampled_from(UndecidedReason).map(lambda reason: Undecided(reason=reason)),
)
tables = st.dictionaries(st.tuples(st.text("ab", min_size=1, max_size=3), st.text("ab", min_size=1, max_size=3)), outcomes)
quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quickly
@given(texts=texts_of_rounds, table=tables, seed=st.integers(0, 99))
def test_no_judge_however_erratic_makes_a_label_that_both_orders_do_not_state(
    texts: list[list[str]], table: dict[tuple[str, str], Outcome], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A table of arbitrary opinions and failures; what it does not list is a refusal."""

    def opinion(left: str, right: str) -> Outcome:
        return table.get((left, right), Undecided(reason=UndecidedReason.REFUSED))

    prompts, judged = judged_by(opinion, texts, seed=seed, ledger=tmp_path_factory.mktemp("l") / "ledger.sqlite")
    for chosen, rejected in labels(prompts, judged, texts).values():
        assert opinion(chosen, rejected) == Decided(p_left=1.0)
        assert opinion(rejected, chosen) == Decided(p_left=0.0)
    counted = figures_of(judged).tally()
    assert counted.total == len(texts) == sum(counted.parts.values())
    assert counted.parts["nothing_to_compare"] == sum(len(set(answers)) < 2 for answers in texts)
    for item in judged:
        if item.judgement.verdict:
            assert verdict_of(*item.final) == item.judgement.verdict, "a verdict is recomputed from its ballots"


@quickly
@given(texts=texts_of_rounds, seed=st.integers(0, 99))
def test_flipping_the_judge_flips_every_label(texts: list[list[str]], seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    def prefers(sign: int) -> Opinion:
        return lambda left, right: Decided(p_left=0.5 + 0.5 * sign * ((left > right) - (left < right)))

    ledgers = tmp_path_factory.mktemp("l")
    prompts, judged = judged_by(prefers(1), texts, seed=seed, ledger=ledgers / "one.sqlite")
    _, flipped = judged_by(prefers(-1), texts, seed=seed, ledger=ledgers / "other.sqlite")
    one, other = labels(prompts, judged, texts), labels(prompts, flipped, texts)
    assert one == {name: (chosen, rejected) for name, (rejected, chosen) in other.items()}
    assert one == {p.id: (max(t), min(t)) for p, t in zip(prompts, texts, strict=True) if len(set(t)) > 1}


def test_of_equal_answers_one_that_ended_by_itself_is_judged(tmp_path: Path) -> None:
    prompt = make_prompt("Question")
    write_prompts(tmp_path / "prompts", [prompt])
    cut, long = FinishReason.LENGTH, "a much longer answer"
    sampled = [("short", cut), (long, cut), ("short", FinishReason.STOP), (long, cut), ("short", FinishReason.STOP)]
    rows = [make_completion(prompt, k, text, finish=finish) for k, (text, finish) in enumerate(sampled)]
    (tmp_path / "generate").mkdir()
    write_jsonl(tmp_path / "generate" / completions_file(0), rows)
    inputs = {"prompts": tmp_path / "prompts", "completions": tmp_path / "generate", "seed": 0}
    judge = VerifierJudge(kind="verifier", function=VERIFIER)
    materialize(judge_stage(Accounts(tmp_path / "ledger.sqlite")), tmp_path / "judge", judge=judge, **inputs)
    (judgement,) = read_judgements(tmp_path / "judge")
    assert (judgement.best_id, judgement.worst_id) == (rows[2].id, rows[1].id)


@pytest.mark.parametrize("first_wins", [True, False])
def test_a_judge_that_only_sees_position_makes_no_label(tmp_path: Path, first_wins: bool) -> None:
    texts = [["a", "b", "c", "d"]] * 20
    prompts, judged = judged_by(lambda left, right: Decided(p_left=float(first_wins)), texts, ledger=tmp_path / "l.sqlite")
    assert labels(prompts, judged, texts) == {}
    seen = figures_of(judged).metrics()
    assert (seen["yield"], seen["consistency"], seen["first_position_win_rate"]) == (0.0, 0.0, float(first_wins))


def test_four_answers_cost_six_calls_and_a_repeat_costs_none(tmp_path: Path) -> None:
    judge = Opinionated(lambda left, right: Decided(p_left=float(left < right)))
    prompt = make_prompt("Question")
    answers = {prompt.id: [Candidate(text, text) for text in "abcd"]}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for _ in range(2):
            found: list[Judged] = []
            asyncio.run(judge_prompts(Asker(judge, ledger), [prompt], answers, found.append, seed=0))
    [judged] = found
    assert (judged.judgement.best_id, judged.judgement.worst_id) == ("a", "d")
    assert len(set(judge.asked)) == len(judge.asked) <= 6
    assert {("a", "d"), ("d", "a")} <= set(judge.asked)


def test_tasks_that_ask_the_same_at_once_share_one_call(tmp_path: Path) -> None:
    judge = Opinionated(lambda left, right: Decided(p_left=1.0), is_instant=False, concurrency=8)
    prompt = make_prompt("Question")

    async def run(asker: Asker) -> None:
        await asyncio.gather(*(asker.ask(prompt, Candidate(str(n), "x"), Candidate(f"-{n}", "y")) for n in range(8)))
        assert (asker.num_asked, asker.num_known) == (1, 7)

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        asyncio.run(run(Asker(judge, ledger)))
    assert judge.asked == [("x", "y")]


# ----------------------------------------------------------------------------------------------------------- on disk


def run_stage(run: Path, judge: object, *, out: str = "judge", seed: int = 0) -> Path:
    stage = judge_stage(Accounts(run / "ledger.sqlite"))
    materialize(stage, run / out, prompts=run / "prompts", completions=run / "generate", judge=judge, seed=seed)
    return run / out


@pytest.fixture
def small_round(tmp_path: Path) -> Path:
    prompts = [make_prompt(f"Question {number}") for number in range(6)]
    answers = [["bb", "a", "ccc", "dddd"], ["a", "bb"], ["same", "same", "same "], ["ee", "ff"], ["alone"], []]
    write_prompts(tmp_path / "prompts", prompts)
    write_answers(tmp_path / "generate", [(p, texts) for p, texts in zip(prompts, answers, strict=True) if texts])
    return tmp_path


def test_every_prompt_is_judged_or_says_why_not(small_round: Path) -> None:
    out = run_stage(small_round, VerifierJudge(kind="verifier", function=VERIFIER))
    judgements = list(read_judgements(out))
    assert [(j.verdict.kind.value if j.verdict else j.why) for j in judgements] == [
        "winner", "winner", "all 3 answers are the same", "tie", "all 1 answers are the same", "no answer",
    ]  # fmt: skip
    first, verdict = make_prompt("Question 0"), judgements[0].verdict
    assert verdict is not None
    assert (verdict.winner_id, verdict.loser_id) == (make_completion(first, 1, "a").id, make_completion(first, 3, "dddd").id)
    assert verdict.margin == 1.0
    ballots = {ballot.key: ballot for ballot in read_ballots(out)}
    assert all(verdict_of(*(ballots[key] for key in j.verdict.ballot_keys)) == j.verdict for j in judgements if j.verdict)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.outcome.tallies[0].parts["nothing_to_compare"] == 3
    assert manifest.outcome.metrics["yield"] == pytest.approx(2 / 6)
    assert manifest.outcome.metrics["cost_usd"] == 0.0


def test_the_same_round_gives_the_same_judgements_with_or_without_a_ledger(small_round: Path) -> None:
    judge = VerifierJudge(kind="verifier", function=VERIFIER)
    first = run_stage(small_round, judge, out="one")
    second = run_stage(small_round, judge, out="two")
    assert (first / "judgements.jsonl").read_bytes() == (second / "judgements.jsonl").read_bytes()
    (small_round / "ledger.sqlite").unlink()
    third = run_stage(small_round, judge, out="three")
    assert (first / "judgements.jsonl").read_bytes() == (third / "judgements.jsonl").read_bytes()
    manifest = read_manifest(second)
    assert manifest is not None
    assert manifest.outcome.metrics["calls_asked"] == 0


def test_completions_of_another_round_are_refused(small_round: Path) -> None:
    write_answers(small_round / "generate", [(make_prompt("from elsewhere"), ["x", "y"])])
    with pytest.raises(CorruptArtifactError, match="not among the round's prompts"):
        run_stage(small_round, VerifierJudge(kind="verifier", function=VERIFIER))


def test_an_api_judge_counts_tokens_and_what_it_could_not_decide(small_round: Path, stub: Stub) -> None:
    def policy(body: dict[str, object]) -> object:
        text = str(body["messages"])
        return chat(None, refusal="no") if "Question 1" in text else says("A" if text.find('\\n"a"') < 0 else "B")

    stub.policy = policy  # type: ignore[assignment]
    out = run_stage(small_round, stub.judge(concurrency=3))
    kinds = [j.verdict.kind if j.verdict else None for j in read_judgements(out)]
    assert kinds[1] is VerdictKind.UNDECIDED
    manifest = read_manifest(out)
    assert manifest is not None
    metrics = manifest.outcome.metrics
    assert metrics["undecided_calls"] == {"refused": 3}, "one match and both orders of the final, of which the match was one"
    assert metrics["input_tokens"] == 100 * len(stub.seen)
    assert metrics["calls_asked"] == len(stub.seen) == len(set(stub.keys))


def test_an_outage_ends_the_stage_and_the_next_try_goes_on_from_there(tmp_path: Path, stub: Stub) -> None:
    prompts = [make_prompt(f"Question {number}") for number in range(40)]
    write_prompts(tmp_path / "prompts", prompts)
    write_answers(tmp_path / "generate", [(prompt, ["x", "y"]) for prompt in prompts])
    stub.script = [says("A") for _ in range(20)]
    stub.policy = lambda body: fails(503, "the lights are out")
    judge = stub.judge(concurrency=4, max_attempts=1, outage_s=0)
    with pytest.raises(JudgeUnavailableError, match="the lights are out"):
        run_stage(tmp_path, judge)
    assert len(stub.seen) <= 20 + 10 + 4
    assert not (tmp_path / "judge").exists()
    answered = set(stub.keys[:20])
    stub.seen.clear()
    stub.policy = lambda body: says("A")
    run_stage(tmp_path, judge)
    assert not answered & set(stub.keys)


def test_a_used_up_quota_ends_the_stage_at_once_and_keeps_what_was_paid(tmp_path: Path, stub: Stub) -> None:
    prompts = [make_prompt(f"Question {number}") for number in range(40)]
    write_prompts(tmp_path / "prompts", prompts)
    write_answers(tmp_path / "generate", [(prompt, ["x", "y"]) for prompt in prompts])
    stub.script = [says("A", delay_s=0.05) for _ in range(6)]
    stub.policy = lambda body: fails(429, "You exceeded your current quota", code="insufficient_quota")
    with pytest.raises(JudgeError, match="exceeded your current quota"):
        run_stage(tmp_path, stub.judge(concurrency=4))
    assert len(stub.seen) <= 6 + 4
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.counts()["done"] == 6
        assert "in_flight" not in ledger.counts()
