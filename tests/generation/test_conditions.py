"""What a stage had finished when it was killed, and went on after the environment was upgraded: one answer to another, one version."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from dpo_loop.artifacts import Stage, materialize, read_manifest
from dpo_loop.config import EngineConfig
from dpo_loop.exchange import read_completions, read_conditions
from dpo_loop.files import write_jsonl
from dpo_loop.generation.conditions import engine_versions, folder_made_with
from dpo_loop.generation.engine import Answer
from dpo_loop.generation.stage import ANSWER, ANSWER_SHARD_SIZE, GENERATE, answer, generate
from dpo_loop.policies import describe_policy
from dpo_loop.types import FinishReason, Message, PolicyRef, Prompt
from tests.generation.engines import begun_with
from tests.generation.worlds import ANSWERING, ENGINE, World


class Saying:
    """An engine that gives every token of every answer this log-prob, and fails at its second call if it is told to."""

    start_s = 0.0

    def __init__(self, logprob: float, *, fails: bool = False) -> None:
        self._logprob, self._fails, self.num_calls = logprob, fails, 0

    def sample(self, asks: list[object], sampling: object, *, stage: str) -> list[Answer]:
        self.num_calls += 1
        if self._fails and self.num_calls == 2:
            raise RuntimeError("out of memory")
        return [Answer(token_ids=(7, 0), finish_reason=FinishReason.STOP, logprob=self._logprob) for _ in asks]

    def score(self, sequences: list[tuple[int, ...]], *, with_adapter: bool) -> list[list[float]]:
        raise AssertionError("a bare base without canary.json is not compared")


def play(world: World, out: Path, engine: Saying, *, prompts: Path) -> None:
    """ANSWER or GENERATE, as the name of `out` says, by the bare base."""

    def start(policy: PolicyRef, config: EngineConfig) -> Saying:
        return engine

    policy = describe_policy(world.base)
    if out.name == "generate":
        stage = Stage(GENERATE.name, GENERATE.version, partial(generate, start=start))
        materialize(stage, out, **{**world.generate_inputs(), "policy": policy})
    else:
        stage = Stage(ANSWER.name, ANSWER.version, partial(answer, start=start))
        materialize(stage, out, prompts=prompts, policy=policy, engine=ENGINE, config=ANSWERING, seed=7)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than one shard of ANSWER."""
    folder = tmp_path_factory.mktemp("prompts")
    asked = ((Message(role="user", content=f"count to {n}"),) for n in range(ANSWER_SHARD_SIZE + 2))
    write_jsonl(folder / "prompts.jsonl", (Prompt.build(messages, source="test") for messages in asked))
    return folder


@pytest.mark.parametrize("name", ["answer", "generate"])
def test_what_was_made_before_an_upgrade_is_made_anew(
    world: World, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The manifest and conditions.json told the versions of the process that ended the stage, whoever had made its first shards."""
    out = tmp_path / name
    with pytest.raises(RuntimeError, match="out of memory"):
        play(world, out, Saying(-1.0, fails=True), prompts=prompts)
    begun_with({"torch": "1.0"}, tmp_path / f".{name}.scratch" / "shards")
    capsys.readouterr()
    play(world, out, Saying(-2.0), prompts=prompts)
    assert {completion.logprob for completion in read_completions(out)} == {-2.0}
    assert read_manifest(out).outcome.metrics["num_shards_resumed"] == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "other versions" in line]
    difference = f"torch was 1.0 and is {engine_versions()['torch']}"
    assert line == f"{name}: what was finished before is made anew, since it was made with other versions: {difference}"
    if name == "answer":
        assert read_conditions(out).versions == engine_versions()


@pytest.mark.parametrize("name", ["answer", "generate"])
def test_what_was_made_with_the_same_versions_is_kept(
    world: World, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / name
    with pytest.raises(RuntimeError, match="out of memory"):
        play(world, out, Saying(-1.0, fails=True), prompts=prompts)
    play(world, out, Saying(-2.0), prompts=prompts)
    assert {completion.logprob for completion in read_completions(out)} == {-1.0, -2.0}
    assert read_manifest(out).outcome.metrics["num_shards_resumed"] == 1
    assert "other versions" not in capsys.readouterr().out


def test_a_folder_is_emptied_only_where_it_was_made_with_other_versions(tmp_path: Path) -> None:
    folder = tmp_path / "scratch" / "shards"
    assert folder_made_with({"vllm": "1", "torch": "2"}, folder) == ""
    (folder / "shard").write_text("x")
    assert folder_made_with({"vllm": "1", "torch": "2"}, folder) == ""
    assert (folder / "shard").is_file()
    assert (
        folder_made_with({"vllm": "1.1", "peft": "3"}, folder)
        == "peft was missing and is 3, torch was 2 and is missing, vllm was 1 and is 1.1"
    )
    assert not (folder / "shard").exists()
    (folder / "journal").touch()  # nothing was finished
    assert folder_made_with({"vllm": "1"}, folder) == ""


def test_what_says_nothing_of_its_versions_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "shard").write_text("x")
    assert folder_made_with({"vllm": "1"}, tmp_path) == "nothing says which"
    assert not (tmp_path / "shard").exists()
