"""The real `vllm run-batch`, a child of the judge: the lines of a batch file come back as verdicts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dpo_loop.errors import JudgeError
from dpo_loop.types import Ballot, Decided
from judges.accounts import Accounts
from judges.asker import Candidate
from judges.config import VllmRunBatchJudge
from judges.jury import open_jury
from tests.builders import build_model
from tests.judges.world import make_prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ENGINE = ("--enforce-eager", "--max-model-len", "8192", "--structured-outputs-config")
ENGINE += ('{"backend": "xgrammar", "disable_any_whitespace": true}',)


def judge_of(weights: Path) -> VllmRunBatchJudge:
    return VllmRunBatchJudge(
        kind="vllm_run_batch", model="tiny", weights=str(weights), args=ENGINE, rationale=False, temperature=1.0
    )


def both_orders(folder: Path, judge: VllmRunBatchJudge) -> tuple[tuple[Ballot, ...], int]:
    async def main() -> tuple[tuple[Ballot, ...], int]:
        async with open_jury(judge, Accounts(folder / "ledger.sqlite")) as jury:
            _, ballots = await jury.both_orders(make_prompt("Say one"), Candidate("a", "one"), Candidate("b", "two"))
            return ballots, jury.num_asked

    return asyncio.run(main())


def test_run_batch_gives_verdicts_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    judge = judge_of(build_model(tmp_path / "model", max_positions=8_192))
    ballots, num_asked = both_orders(tmp_path, judge)
    assert num_asked == 2
    assert all(isinstance(ballot.outcome, Decided) for ballot in ballots), [ballot.outcome for ballot in ballots]
    assert all(ballot.usage.input_tokens > 100 and ballot.served_model == "tiny" for ballot in ballots)
    assert both_orders(tmp_path, judge) == (ballots, 0)
    assert {path.suffix for path in (tmp_path / "ledger.sqlite.batches").iterdir()} == {".log"}


def test_an_engine_that_cannot_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"refused as a whole: vllm run-batch ended with 1: .*nowhere.*\.log"):
        both_orders(tmp_path, judge_of(tmp_path / "nowhere"))
