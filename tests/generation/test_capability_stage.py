"""The stage `capability` without an engine: what it makes of bad files and bad items, what it keeps, and under which conditions it says it asked."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest

from dpo_loop.artifacts import Stage, fingerprint, materialize, read_manifest
from dpo_loop.config import CapabilityConfig
from dpo_loop.errors import InputError
from dpo_loop.exchange import CAPABILITY as ROWS_FILE
from dpo_loop.exchange import read_conditions
from dpo_loop.generation.capability import measure
from dpo_loop.generation.chat import Chat
from dpo_loop.generation.conditions import engine_versions
from dpo_loop.generation.local_tasks import windows
from dpo_loop.policies import describe_policy
from tests.generation.engines import Even, begun_with, choice, exact, play, text, texts, write
from tests.generation.producing import lm_eval, stand_in, writes
from tests.generation.worlds import ENGINE, World


def test_a_tie_between_choices_is_wrong(world: World, tmp_path: Path) -> None:
    file = write(tmp_path / "choices.jsonl", {"prompt": "which?", "choices": ["five", "count to five"], "answer": 0})
    [row] = play(world, tmp_path / "mean", Even(), choice(file))["choice"]
    assert (row.value, row.response) == (0.0, "five = count to five")
    [row] = play(world, tmp_path / "sum", Even(), choice(file, normalised=False))["choice"]
    assert (row.value, row.response) == (1.0, "five")


@pytest.mark.parametrize("odd", [math.nan, -math.inf])
def test_a_log_prob_that_is_no_number_leaves_its_item_unscored_and_counted(world: World, tmp_path: Path, odd: float) -> None:
    choices = write(tmp_path / "choices.jsonl", {"prompt": "which?", "choices": ["five", "six"], "answer": 0})
    documents = texts(tmp_path / "texts.jsonl")
    rows = play(world, tmp_path / "out", Even(odd=odd), choice(choices), text(documents))
    assert [row.value for of_task in rows.values() for row in of_task] == [None] * 11
    outcome = read_manifest(tmp_path / "out").outcome
    assert [tally.parts["unscored"] for tally in outcome.tallies] == [1, 10]
    assert outcome.metrics["tasks"]["text"] == {"perplexity": None, "num_items": 10, "num_unscored": 10}


def test_a_finished_task_is_kept_when_the_stage_dies(world: World, tmp_path: Path) -> None:
    answers = write(tmp_path / "exact.jsonl", {"prompt": "say", "answer": "it"})
    tasks = (exact(answers), text(texts(tmp_path / "texts.jsonl")))
    with pytest.raises(RuntimeError, match="out of memory"):
        play(world, tmp_path / "out", Even(fails_at_score=True), *tasks)
    engine = Even()
    rows = play(world, tmp_path / "out", engine, *tasks)
    assert engine.num_sampled == 0
    assert ([row.value for row in rows["exact"]], len(rows["text"])) == ([0.0], 10)


def test_a_task_that_was_played_with_other_versions_of_the_engine_is_played_again(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = write(tmp_path / "exact.jsonl", {"prompt": "say", "answer": "it"})
    tasks = (exact(answers), text(texts(tmp_path / "texts.jsonl")))
    with pytest.raises(RuntimeError, match="out of memory"):
        play(world, tmp_path / "out", Even(fails_at_score=True), *tasks)
    begun_with({"torch": "1.0"}, tmp_path / ".out.scratch" / "task-exact")
    capsys.readouterr()
    engine = Even()
    play(world, tmp_path / "out", engine, *tasks)
    assert engine.num_sampled == 1
    assert read_conditions(tmp_path / "out").versions == engine_versions()
    [line] = [line for line in capsys.readouterr().out.splitlines() if "other versions" in line]
    assert (
        line == f"capability: exact made anew, since begun with other versions: torch was 1.0 and is {engine_versions()['torch']}"
    )


def test_rows_are_written_with_the_conditions_they_were_made_under(world: World, tmp_path: Path) -> None:
    answers = write(tmp_path / "exact.jsonl", {"prompt": "say", "answer": "it"}, {"prompt": "say", "answer": "that"})
    right = {"item_id": "i", "measure": "correct", "value": 1.0}
    produced = lm_eval(None, "arc", python=stand_in(tmp_path / "python", writes(right)))
    play(world, tmp_path / "out", Even(), exact(answers), produced)
    conditions = read_conditions(tmp_path / "out")
    policy = describe_policy(world.base)
    assert (conditions.policy_key, conditions.has_adapter, conditions.canary) == (policy.key, False, None)
    assert conditions.template_sha256 == Chat(policy).template_sha256
    assert conditions.engine == ENGINE.model_dump(mode="json", exclude={"canary_tolerance"})
    assert conditions.versions == {**engine_versions(), "arc/lm-eval": "0.4.13", "arc/torch": "2.13.0"}


def test_other_items_are_other_prompts(world: World, tmp_path: Path) -> None:
    def asked(name: str, *answers: str) -> str:
        file = write(tmp_path / f"{name}.jsonl", *({"prompt": "say", "answer": answer} for answer in answers))
        play(world, tmp_path / name, Even(), exact(file))
        return read_conditions(tmp_path / name).prompts_sha256

    assert asked("one", "it", "that") == asked("order", "that", "it") != asked("fewer", "it")


def test_a_handful_of_documents_is_refused_with_the_way_out(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"texts\.jsonl: capability task text has 9 documents.*add documents, or divide long ones"):
        play(world, tmp_path / "out", Even(), text(texts(tmp_path / "texts.jsonl", 9)))


def test_all_bad_lines_of_all_files_are_listed_by_number(world: World, tmp_path: Path) -> None:
    good = {"prompt": "say", "answer": "it"}
    answers = write(
        tmp_path / "exact.jsonl",
        good,
        {"prompt": "say"},
        {"answer": "it"},
        good,
        {"prompt": "p", "answer": []},
        {"prompt": " ", "answer": "a"},
    )
    answers.write_text(answers.read_text() + '{"prompt": \n')
    options = {"prompt": "which?", "choices": ["a", "b"]}
    choices = write(
        tmp_path / "choices.jsonl",
        {**options, "answer": 2},
        {**options, "answer": True},
        {**options, "choices": ["a", "a"], "answer": 0},
        {"messages": [{"role": "assistant", "content": "hm"}], "choices": ["a", "b"], "answer": 0},
    )
    bad_texts = write(tmp_path / "texts.jsonl", {"text": " "}, {"words": "x"})
    latin = tmp_path / "latin.txt"
    latin.write_bytes("one\n\nf\xfcnf".encode("latin-1"))
    empty = write(tmp_path / "empty.jsonl")
    tasks = (exact(answers), choice(choices), text(bad_texts), *(text(f).model_copy(update={"id": f.stem}) for f in (latin, empty)))
    with pytest.raises(InputError) as caught:
        play(world, tmp_path / "out", Even(), *tasks)
    said = [line.strip().replace(f"{tmp_path}/", "") for line in str(caught.value).splitlines()[1:]]
    for line, begin in zip(
        said,
        (
            "exact.jsonl:2: answer: Field required",
            'exact.jsonl:3: wanted {"prompt": "..."} or {"messages": [...]}',
            "exact.jsonl:4: the same as line 1",
            "exact.jsonl:5: there is no accepted answer, or an empty one",
            "exact.jsonl:6: the conversation must end with a user turn, and no turn may be empty",
            "exact.jsonl:7: Invalid JSON",
            "choices.jsonl:1: answer 2 is none of the 2 choices; they are counted from 0",
            "choices.jsonl:2: answer: Input should be a valid integer",
            "choices.jsonl:3: a choice is empty, or there twice",
            "choices.jsonl:4: the conversation must end with a user turn",
            "texts.jsonl:1: a text without a word",
            "texts.jsonl:2: text: Field required",
            "latin.txt:3: not UTF-8",
            "empty.jsonl:1: the file holds no item",
        ),
        strict=True,
    ):
        assert line.startswith(begin)


def test_windows_predict_every_token_but_the_first_once() -> None:
    for num in range(1, 40):
        parts = windows(tuple(range(num)), 8)
        assert [token for part in parts for token in part[1:]] == list(range(1, num))
        assert all(len(part) <= 8 for part in parts)


def test_no_tasks_make_an_empty_file_without_an_engine(world: World, tmp_path: Path) -> None:
    materialize(
        Stage("capability", 1, partial(measure, start=lambda policy, config: pytest.fail("an engine was started"))),
        tmp_path / "out",
        policy=describe_policy(world.base),
        engine=ENGINE,
        config=CapabilityConfig(),
        files=(),
        seed=0,
    )
    assert (tmp_path / "out" / ROWS_FILE).read_text() == ""


def test_where_a_tasks_file_lies_is_not_in_the_key_and_its_content_is(tmp_path: Path) -> None:
    here, there = (
        write(tmp_path / "a.jsonl", {"prompt": "p", "answer": "a"}),
        write(tmp_path / "b.jsonl", {"prompt": "p", "answer": "a"}),
    )
    assert fingerprint(exact(here)) == fingerprint(exact(there))
    assert fingerprint((here,)) == fingerprint((there,))
    write(there, {"prompt": "p", "answer": "b"})
    assert fingerprint((here,)) != fingerprint((there,))


def test_tasks_share_no_id() -> None:
    with pytest.raises(ValueError, match="share the id exact"):
        CapabilityConfig(tasks=(exact(Path("a")), exact(Path("b"))))
