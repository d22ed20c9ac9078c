"""What a person has to write before an external set is loaded, and what is refused; no network is needed to tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from dpo_loop.artifacts import fingerprint
from dpo_loop.config import ExternalPool, Pool, PromptsConfig
from dpo_loop.errors import InputError, StaleArtifactError
from dpo_loop.prompts.external import KNOWN, problems
from dpo_loop.prompts.pool import read_pool
from flows.rounds import adopt_config
from flows.steps import read_run_config
from tests.flows.runs import small_config, started_run
from tests.prompts.read_pools import CUSTOM, known


@pytest.mark.parametrize("name", KNOWN)
def test_without_the_name_of_its_licence_no_set_is_loaded_and_the_line_to_add_is_told(name: str) -> None:
    for ack in ("", "WTFPL"):
        pool = ExternalPool.model_validate(known(name, licence_ack=ack, required=False))
        with pytest.raises(InputError) as caught:
            read_pool(pool, None, skip_bad=True)
        assert f"`licence_ack: {KNOWN[name].licence}`" in str(caught.value)
        assert f"https://huggingface.co/datasets/{KNOWN[name].source}" in str(caught.value)
        assert ("not WTFPL" in str(caught.value)) == bool(ack)
    assert list(problems(ExternalPool.model_validate(known(name)))) == []


def test_a_custom_set_needs_the_name_of_a_licence_too() -> None:
    (problem,) = problems(ExternalPool.model_validate({**CUSTOM, "licence_ack": " "}))
    assert problem.startswith("licence_ack: read under which licence org/own is")


def test_where_the_project_pins_no_revision_one_must_be_given() -> None:
    unpinned = [name for name, wanted in KNOWN.items() if wanted.revision is None]
    assert set(unpinned) == {"or-bench-hard", "or-bench-toxic", "advbench", "do-not-answer", "sorry-bench", "wildguardmix-test"}
    for name in unpinned:
        (problem,) = problems(ExternalPool.model_validate(known(name, revision=None)))
        assert problem.startswith(f"revision: the project pins no revision of {name}; take a commit of https://huggingface.co/")


@pytest.mark.parametrize("revision", ["main", "v1.0", "df54272", "A" * 40, "refs/pr/1"])
def test_a_revision_that_can_move_is_refused(revision: str) -> None:
    with pytest.raises(ValidationError, match=r"a branch or tag can move.*give the 40 hex digits of a commit"):
        ExternalPool.model_validate(known("xstest", revision=revision))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"set": "xstest"}, "source, split, columns of xstest are known"),
        ({"source": None, "columns": None}, "a custom set needs source, columns"),
        ({"revision": None}, "a custom set needs revision"),
        ({"columns": {"side": "task"}}, "columns.side"),
        ({"columns": {"side": {"field": "label", "values": {"safe": "task"}}}}, "values.safe"),
        ({"columns": {"side": {"field": "label", "values": {}}}}, "at least 1 item"),
        ({"set": "toxigen"}, "set"),
    ],
)
def test_a_set_that_says_too_much_or_too_little_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        TypeAdapter(Pool).validate_python({**CUSTOM, **change})


def test_the_config_names_the_sets_that_are_known() -> None:
    assert set(get_args(ExternalPool.model_fields["set"].annotation)) == {*KNOWN, "custom"}


def test_no_external_set_is_a_training_pool() -> None:
    for pool in (CUSTOM, ExternalPool.model_validate(CUSTOM)):
        with pytest.raises(ValidationError, match="an external set only evaluates and is never trained on"):
            PromptsConfig.model_validate({"pool": pool})


def test_a_run_goes_on_without_a_set_as_the_error_advises(tmp_path: Path) -> None:
    """`required` refuses and makes nothing, so a change of it makes nothing stale once the run has begun."""
    pool = {"kind": "jsonl", "path": "world:pool.jsonl"}
    run = started_run(tmp_path / "run", prompts={"pool": pool, "eval_sets": [known("xstest", required=True)]})
    before = fingerprint(read_run_config(run))
    adopt_config(run, small_config(run.path, prompts={"pool": pool, "eval_sets": [known("xstest", required=False)]}))
    config = read_run_config(run)
    [optional] = config.prompts.eval_sets
    assert isinstance(optional, ExternalPool)
    assert not optional.required
    assert fingerprint(config) == before
    with pytest.raises(StaleArtifactError, match=r"prompts.eval_sets"):
        adopt_config(run, small_config(run.path, prompts={"pool": pool}))
