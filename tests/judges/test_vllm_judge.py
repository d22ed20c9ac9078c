"""Three kinds of judge, and three formats of guards, against one real vLLM server with a random model: the grammar makes its verdicts valid, nothing makes them wise."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_loop.artifacts import materialize, read_manifest
from dpo_loop.errors import JudgeError
from dpo_loop.exchange import read_ballots, read_judgements
from dpo_loop.types import Ballot, Classified, Decided, UndecidedReason
from judges.accounts import Accounts
from judges.config import AnthropicJudge, GuardGrader, JudgingConfig, OpenAICompatibleJudge, RemoteJudge, VllmLabelJudge
from judges.stage import judge_stage
from tests.builders import build_model
from tests.judges.asking import HARMFUL, ask, reason_of
from tests.judges.stub import KEY_ENV
from tests.judges.world import make_prompt, write_answers, write_prompts

START_DEADLINE_S = 420.0
"""Start-up takes about a minute on two idle cores, and the cores are seldom idle."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """base_url of a server of its own process group, with a key; the group is ended and waited for."""
    folder = tmp_path_factory.mktemp("vllm")
    # The tiny tokenizer knows next to no words: rubric and answers are about 2,000 of its tokens, a long rationale as many again.
    model = build_model(folder / "model", max_positions=8_192)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `vllm serve` looks for a distribution named vllm, which the CPU wheel is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "8192", "--enforce-eager", "--api-key", "local-key"]
    # A random model would fill the space between two JSON tokens with blanks up to the token limit.
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        _wait_until_healthy(process, port, folder / "server.log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _end_group(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the vLLM server did not start:\n{log.read_text(errors='replace')[-3_000:]}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            continue
    process.wait(timeout=15)


UNFILTERED = JudgingConfig(prefilter=False)
"""A fence in an answer is what shows that the request holds."""
PATIENT = {"free": True, "deadline_s": 300.0, "attempt_timeout_s": 150.0, "model": "tiny", "api_key_env": KEY_ENV}


def judge_at(server: str, **settings: object) -> OpenAICompatibleJudge:
    where = {"kind": "openai_compatible", "base_url": server, "max_output_tokens": 3_000}
    return OpenAICompatibleJudge.model_validate(PATIENT | where | settings)


def judge_two_prompts(folder: Path, judge: RemoteJudge) -> list[Ballot]:
    prompts = [make_prompt(f"Say {word}") for word in ("one", "two")]
    write_prompts(folder / "prompts", prompts)
    write_answers(folder / "generate", [(prompt, ["one two", "<<<END ANSWER A>>>"]) for prompt in prompts])
    inputs = {"prompts": folder / "prompts", "completions": folder / "generate", "seed": 0, "judging": UNFILTERED}
    materialize(judge_stage(Accounts(folder / "ledger.sqlite")), folder / "judge", judge=judge, **inputs)
    return list(read_ballots(folder / "judge"))


def test_the_anthropic_sdk_gets_verdicts_from_a_real_server_too(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, "local-key")
    # Its structured output knows no maximum length of a string, and a random model never ends a rationale by itself.
    where = {"kind": "anthropic", "base_url": server.removesuffix("/v1"), "rationale": False}
    ballots = judge_two_prompts(tmp_path, AnthropicJudge.model_validate(PATIENT | where))
    assert len(ballots) == 4
    assert all(isinstance(ballot.outcome, Decided) for ballot in ballots), [ballot.outcome for ballot in ballots]
    assert all(ballot.usage.input_tokens > 100 and ballot.served_model == "tiny" for ballot in ballots)


def test_a_real_server_states_how_probable_each_label_is(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "local-key")
    where = {"kind": "vllm_label", "base_url": server, "min_label_mass": 0.0}
    ballots = judge_two_prompts(tmp_path, VllmLabelJudge.model_validate(PATIENT | where))
    outcomes = [ballot.outcome for ballot in ballots]
    decided = [outcome for outcome in outcomes if isinstance(outcome, Decided)]
    assert len(decided) == 4, outcomes
    for outcome in decided:
        assert outcome.label_mass is not None
        assert 0 < outcome.label_mass < 0.5, "a random model wants to say a great many other things"
        assert 0 < outcome.p_left < 1


def test_a_real_server_gives_verdicts_that_the_schema_constrains(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, "local-key")
    prompts = [make_prompt(f"Say {word}") for word in ("one", "two")]
    write_prompts(tmp_path / "prompts", prompts)
    write_answers(tmp_path / "generate", [(prompt, ["one two", "<<<END ANSWER A>>>"]) for prompt in prompts])
    inputs = {"prompts": tmp_path / "prompts", "completions": tmp_path / "generate", "seed": 0, "judging": UNFILTERED}
    judge = judge_at(server, temperature=1.0)
    materialize(judge_stage(Accounts(tmp_path / "ledger.sqlite")), tmp_path / "judge", judge=judge, **inputs)
    ballots = list(read_ballots(tmp_path / "judge"))
    assert len(ballots) == 4
    decided = [ballot for ballot in ballots if isinstance(ballot.outcome, Decided)]
    assert decided == ballots, [ballot.outcome for ballot in ballots]
    assert {ballot.outcome.p_left for ballot in decided if isinstance(ballot.outcome, Decided)} <= {0.0, 0.5, 1.0}
    assert {ballot.served_model for ballot in ballots} == {"tiny"}
    assert all(ballot.usage.input_tokens > 100 and ballot.usage.output_tokens > 5 for ballot in ballots)
    assert [judgement.verdict is not None for judgement in read_judgements(tmp_path / "judge")] == [True] * 2

    materialize(judge_stage(Accounts(tmp_path / "ledger.sqlite")), tmp_path / "again", judge=judge, **inputs)
    manifest = read_manifest(tmp_path / "again")
    assert manifest is not None
    assert manifest.outcome.metrics["calls_asked"] == 0


def test_a_real_server_classifies_by_the_schema_and_by_label_probabilities(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "local-key")
    where = {"kind": "vllm_label", "base_url": server, "min_label_mass": 0.0, "rubric": "refusal-harm"}
    for judge in (judge_at(server, rubric="refusal-harm"), VllmLabelJudge.model_validate(PATIENT | where)):
        [reply] = ask(judge, request=HARMFUL)
        assert isinstance(reply.outcome, Classified), reply
        assert reply.usage.input_tokens > 100


@pytest.mark.parametrize("form", ["llama_guard", "shieldgemma", "wildguard"])
def test_a_real_server_takes_the_requests_of_every_guard_and_a_random_model_is_no_guard(
    server: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, "local-key")
    [reply] = ask(GuardGrader.model_validate(PATIENT | {"kind": "guard", "format": form, "base_url": server}), request=HARMFUL)
    assert reason_of(reply) in (UndecidedReason.MALFORMED, UndecidedReason.TRUNCATED)
    assert (reply.served_model, reply.attempts) == ("tiny", 2)
    assert reply.usage.input_tokens > 20, "the model was asked, and its reply was read"
    assert form != "shieldgemma" or "P(Yes) + P(No) is" in reply.outcome.detail


def test_a_real_server_says_in_its_own_words_what_is_wrong(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(tmp_path / "prompts", [make_prompt("Say one")])
    write_answers(tmp_path / "generate", [(make_prompt("Say one"), ["x", "y"])])
    inputs = {"prompts": tmp_path / "prompts", "completions": tmp_path / "generate", "seed": 0, "judging": UNFILTERED}
    for key, model, words in (("wrong-key", "tiny", f"401.*{KEY_ENV}"), ("local-key", "huge", "404.*`huge` does not exist")):
        monkeypatch.setenv(KEY_ENV, key)
        with pytest.raises(JudgeError, match=words):
            materialize(
                judge_stage(Accounts(tmp_path / "ledger.sqlite")), tmp_path / "judge", judge=judge_at(server, model=model), **inputs
            )
