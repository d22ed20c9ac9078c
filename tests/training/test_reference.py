"""Reference log-probs are computed once per completion, survive interruption, and are never those of something else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dpo_loop.training.reference as reference_module
from dpo_loop.errors import CorruptArtifactError, InputError, TrainingDivergedError
from dpo_loop.training.forward.logprobs import completion_logprobs
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.logprob_store import LogprobStore, entry_of
from dpo_loop.training.models import build_accelerator, load_policy
from dpo_loop.training.objectives.preferences import sequences_of
from dpo_loop.training.reference import reference_logprobs
from dpo_loop.types import PolicyRef
from tests.training.world import make_pairs

ACCELERATOR = build_accelerator("float32")


def some_sequences(num_pairs: int = 6) -> list[TokenSequence]:
    chosen, rejected = sequences_of(make_pairs(num_pairs))
    return [*chosen, *rejected]


def compute(policy: PolicyRef, sequences: list[TokenSequence], keep: Path, **changes: object) -> list[torch.Tensor]:
    arguments: dict = {"accelerator": ACCELERATOR, "keep": keep, "max_tokens": 100} | changes
    return reference_logprobs(policy, sequences, **arguments)


def worst(one: list[torch.Tensor], two: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


def shards(keep: Path) -> set[Path]:
    return set(keep.glob("reference-*.safetensors"))


def test_values_are_those_of_separate_forwards_whatever_the_batches(tmp_path: Path, adapted: PolicyRef) -> None:
    sequences = some_sequences()
    model = load_policy(adapted, accelerator=ACCELERATOR)
    with torch.no_grad():
        expected = [completion_logprobs(model, [sequence], device=torch.device("cpu")) for sequence in sequences]
    for number, changes in enumerate([{}, {"max_tokens": 1}, {"max_tokens": 10_000}, {"forward": "padded"}]):
        keep = tmp_path / str(number)
        keep.mkdir()
        found = compute(adapted, sequences, keep, **changes)
        assert {(values.dtype, values.device.type) for values in found} == {(torch.float32, "cpu")}
        assert worst(found, expected) < 1e-5


def test_a_completion_is_known_by_its_tokens_not_by_its_place(
    tmp_path: Path, base: PolicyRef, capsys: pytest.CaptureFixture[str]
) -> None:
    sequences = some_sequences()
    first = compute(base, sequences, tmp_path)
    again = compute(base, [*reversed(sequences), sequences[0]], tmp_path)
    assert worst(again, [*reversed(first), first[0]]) == 0
    assert len(shards(tmp_path)) == 1
    assert "train: reference of 12 completions, kept from before" in capsys.readouterr().out


def test_where_prompt_ends_and_completion_begins_is_part_of_the_identity(tmp_path: Path, base: PolicyRef) -> None:
    one, two = compute(base, [TokenSequence((5, 6), (7, 8)), TokenSequence((5,), (6, 7, 8))], tmp_path)
    assert (len(one), len(two)) == (2, 3)


def test_new_completions_are_added_to_those_that_are_kept(tmp_path: Path, base: PolicyRef) -> None:
    sequences = some_sequences()
    first = compute(base, sequences[:5], tmp_path)
    kept = shards(tmp_path)
    found = compute(base, sequences, tmp_path)
    assert worst(found[:5], first) == 0
    (added,) = shards(tmp_path) - kept
    assert len(load_file(added)["lengths"]) == 7


def test_duplicates_are_scored_once(tmp_path: Path, base: PolicyRef) -> None:
    sequences = some_sequences(2) * 3
    found = compute(base, sequences, tmp_path)
    (kept,) = shards(tmp_path)
    assert len(load_file(kept)["lengths"]) == 4
    assert worst(found[:4], found[8:]) == 0


def test_another_policy_or_another_forward_finds_nothing(tmp_path: Path, base: PolicyRef, adapted: PolicyRef) -> None:
    sequences = some_sequences()
    first = compute(base, sequences, tmp_path)
    other = compute(adapted, sequences, tmp_path)
    assert worst(first, other) > 1e-2
    assert len(shards(tmp_path)) == 2
    padded = compute(base, sequences, tmp_path, forward="padded")
    assert len(shards(tmp_path)) == 3
    assert worst(first, padded) < 1e-5


def test_a_quantised_reference_has_a_store_of_its_own(base: PolicyRef) -> None:
    """T27: values of the base in 16 bits would be taken for those of the base in 4."""
    scorer = build_scorer(load_policy(base, accelerator=ACCELERATOR), device=ACCELERATOR.device, forward="padded")
    names = {reference_module._store_name(base, scorer, ACCELERATOR, quantized) for quantized in (None, "nf4")}
    assert len(names) == 2


def test_kept_values_that_are_not_the_references_are_found(tmp_path: Path, base: PolicyRef, adapted: PolicyRef) -> None:
    """T21: a stale cache."""
    sequences = some_sequences()
    compute(base, sequences, tmp_path)
    (kept,) = shards(tmp_path)
    compute(adapted, sequences, tmp_path)
    (other,) = shards(tmp_path) - {kept}
    kept.write_bytes(other.read_bytes())
    with pytest.raises(TrainingDivergedError, match=r"differ by .* Remove reference-\*\.safetensors"):
        compute(base, sequences, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_log_prob_that_is_no_number_is_never_used(value: float, tmp_path: Path, base: PolicyRef) -> None:
    """One of twelve completions, and not the first: `max` of Python passes over NaN that it does not meet first."""
    sequences = some_sequences()
    compute(base, sequences, tmp_path)
    (kept,) = shards(tmp_path)
    store = LogprobStore(tmp_path, kept.name.split("-")[1])
    values = store.read()
    entry = entry_of(sequences[3])
    values[entry] = values[entry].clone()
    values[entry][-1] = value
    store.write(values)
    length = len(sequences[3].completion)
    with pytest.raises(
        TrainingDivergedError, match=rf"token {length} \(id \d+\) of a completion of {length} tokens.* the log-prob {value}"
    ):
        compute(base, sequences, tmp_path)


def test_a_reference_that_computes_no_numbers_is_named(base: PolicyRef) -> None:
    """Weights that are finite and overflow on the way, though not where the probe looked."""
    model = load_policy(base, accelerator=ACCELERATOR)
    scorer = build_scorer(model, device=ACCELERATOR.device, forward="padded")
    for name, parameter in model.named_parameters():
        parameter.data *= 1e30 if "mlp" in name else 1
    (sequence, *_) = some_sequences()
    reference = reference_module._Pass(scorer, ACCELERATOR, 100, num_all=1, num_done=0)
    with pytest.raises(TrainingDivergedError, match=r"token 1 \(id \d+\) .* the log-prob nan; .*the model overflows"):
        reference.score({entry_of(sequence): sequence})


@pytest.mark.parametrize("name", ["logprobs", "lengths", "entries"])
def test_a_value_that_changed_on_the_disk_is_found(name: str, tmp_path: Path, base: PolicyRef) -> None:
    """All of them are still numbers, and the few that are computed again may be others."""
    compute(base, some_sequences(), tmp_path)
    (kept,) = shards(tmp_path)
    shard = load_file(kept)
    shard[name].view(-1)[-1] += 1
    save_file(shard, kept)
    with pytest.raises(CorruptArtifactError, match=f"{kept.name} is damaged .*not those that were written.*Remove it"):
        compute(base, some_sequences(), tmp_path)


def test_a_damaged_shard_is_named_with_the_way_out(tmp_path: Path, base: PolicyRef) -> None:
    compute(base, some_sequences(), tmp_path)
    (kept,) = shards(tmp_path)
    kept.write_bytes(kept.read_bytes()[:-4])
    with pytest.raises(CorruptArtifactError, match=f"{kept.name} is damaged .*Remove it"):
        compute(base, some_sequences(), tmp_path)


def test_a_pass_that_was_stopped_goes_on_where_it_was_and_ends_with_the_same_bits(
    tmp_path: Path, base: PolicyRef, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference_module, "_WINDOW", 5)
    sequences = some_sequences(10)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    expected = compute(base, sequences, whole)
    assert len(shards(whole)) == 4
    for path in sorted(shards(whole))[:2]:
        (stopped / path.name).write_bytes(path.read_bytes())
    (stopped / ".reference-torn.tmp").write_bytes(b"half")
    capsys.readouterr()
    found = compute(base, sequences, stopped)
    assert worst(found, expected) == 0
    assert {path.name: path.read_bytes() for path in shards(stopped)} == {path.name: path.read_bytes() for path in shards(whole)}
    assert capsys.readouterr().out.splitlines() == [
        "train: reference of 10 completions, kept from before",
        "train: reference 20/20 completions",
    ]


def test_a_forward_that_does_not_fit_is_halved_once_then_named(
    tmp_path: Path, base: PolicyRef, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The allocator is played: forwards of more than `room` completions raise what CUDA's raises."""
    room = 3
    plain = reference_module._Pass._forward

    def forward(self: object, sequences: list[TokenSequence]) -> tuple[torch.Tensor, ...]:
        if len(sequences) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, sequences)

    monkeypatch.setattr(reference_module._Pass, "_forward", forward)
    sequences = [TokenSequence((5, 6, 7), (8, 9, last)) for last in range(10, 16)]
    found = compute(base, sequences, tmp_path, forward="padded", max_tokens=30)
    assert len(found) == 6
    assert "going on with 15 tokens at a time" in capsys.readouterr().out
    room = 0
    with pytest.raises(InputError, match=r"does not fit into memory with 15 tokens .*Tried to allocate 2.00 GiB"):
        compute(base, [TokenSequence((5,), (6,))], tmp_path, max_tokens=30)


@pytest.mark.slow
def test_two_processes_share_the_work_and_both_have_all_of_it(tmp_path: Path, base: PolicyRef) -> None:
    sequences = some_sequences(10)
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    expected = compute(base, sequences, alone)
    (tmp_path / "policy.json").write_text(base.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(shards(together)) == 2
    found = [torch.load(tmp_path / f"found-{rank}.pt") for rank in (0, 1)]
    assert worst(found[0], found[1]) == 0
    assert worst(found[0], expected) < 1e-5
    assert done.stdout.count("train: reference 20/20 completions") == 1


CHILD = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from dpo_loop.training.reference import reference_logprobs
from dpo_loop.types import PolicyRef
from tests.training.test_reference import some_sequences

folder = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
policy = PolicyRef.model_validate_json((folder / "policy.json").read_text())
found = reference_logprobs(policy, some_sequences(10), accelerator=accelerator, keep=folder / "together", max_tokens=100)
torch.save(found, folder / f"found-{accelerator.process_index}.pt")
"""
