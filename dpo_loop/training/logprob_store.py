"""Log-probs of completions on disk: shards of a folder, each whole or absent, every entry known by the token ids it belongs to.

What else the values depend on (weights, adapter, precision, forward) is the name of the store, so nothing stale is ever found. Several
processes may write at once: a shard is named for what is in it.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dpo_loop.errors import CorruptArtifactError
from dpo_loop.files import sync_directory
from dpo_loop.training.forward.sequences import TokenSequence

_ENTRY_BYTES = 16


def entry_of(sequence: TokenSequence) -> bytes:
    """Identity of a prompt with a completion: over both lists of token ids and where one ends."""
    ids = array("q", [len(sequence.prompt), *sequence.prompt, *sequence.completion])
    return hashlib.blake2b(ids.tobytes(), digest_size=_ENTRY_BYTES).digest()


class LogprobStore:
    """name: a hash over what all values depend on."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def read(self) -> dict[bytes, Tensor]:
        """fp32 [N] on the CPU of every entry. Raises CorruptArtifactError for a shard that cannot be read or is not as it was written."""
        found: dict[bytes, Tensor] = {}
        for path in sorted(self._folder.glob(f"reference-{self._name}-*.safetensors")):
            try:
                shard = load(path.read_bytes())
                if shard.pop("digest").tolist() != _digest(shard):
                    raise ValueError("its values are not those that were written")
                values = torch.split(shard["logprobs"], shard["lengths"].tolist())
                entries = [bytes(row) for row in shard["entries"].tolist()]
                found |= dict(zip(entries, values, strict=True))
            except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
                raise CorruptArtifactError(
                    f"{path} is damaged ({type(error).__name__}: {error}). Remove it and run the same command again; its log-probs are computed anew."
                ) from error
        return found

    def write(self, values: Mapping[bytes, Tensor]) -> None:
        """One shard, aside and renamed."""
        name = hashlib.blake2b(b"".join(values), digest_size=8).hexdigest()
        path = self._folder / f"reference-{self._name}-{name}.safetensors"
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        tensors = {
            "logprobs": torch.cat(list(values.values())),
            "lengths": torch.tensor([len(logps) for logps in values.values()]),
            "entries": torch.tensor([list(entry) for entry in values], dtype=torch.uint8),
        }
        digest = torch.tensor(_digest(tensors), dtype=torch.uint8)
        with aside.open("wb") as file:
            file.write(save(tensors | {"digest": digest}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_directory(self._folder)


def _digest(shard: Mapping[str, Tensor]) -> list[int]:
    """Over all values: safetensors has no checksum, and a flipped bit is another log-prob that nothing else would find."""
    hashed = hashlib.blake2b(digest_size=32)
    for name in sorted(shard):
        hashed.update(shard[name].numpy().tobytes())
    return list(hashed.digest())
