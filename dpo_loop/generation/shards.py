"""Shards of completions that survive a crash. A shard is one engine call; it is whole on disk or it is done again.

.generate.scratch/shards/completions-00000.jsonl    written aside, fsynced, renamed
.generate.scratch/shards/shards.jsonl               a row per finished shard, with the file's sha256, written after it
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from dpo_loop.artifacts import sha256_file
from dpo_loop.exchange import completions_file
from dpo_loop.files import sync_directory, write_text
from dpo_loop.journal import Journal
from dpo_loop.types import Completion, Record


class ShardFigures(Record):
    """What one shard was. seconds: of the engine call."""

    shard: int
    sha256: str
    num_prompts: int
    num_completions: int
    num_truncated: int
    num_tokens: int
    logprob: float
    """Summed over its completions, nats."""
    seconds: float


class Shards:
    """The finished shards of one stage, found again after a crash."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = Journal(folder / "shards.jsonl")
        self.finished: dict[int, ShardFigures] = {}
        for row in self._journal.rows:
            figures = ShardFigures.model_validate(row)
            path = folder / completions_file(figures.shard)
            if path.is_file() and sha256_file(path) == figures.sha256:
                self.finished[figures.shard] = figures

    def finish(self, shard: int, completions: Sequence[Completion], *, seconds: float) -> ShardFigures:
        """Make a shard durable."""
        path = self._folder / completions_file(shard)
        write_text(path, "".join(c.model_dump_json() + "\n" for c in completions))
        sync_directory(self._folder)
        figures = ShardFigures(
            shard=shard,
            sha256=sha256_file(path),
            num_prompts=len({c.prompt_id for c in completions}),
            num_completions=len(completions),
            num_truncated=sum(c.finish_reason == "length" for c in completions),
            num_tokens=sum(len(c.token_ids) for c in completions),
            logprob=sum(c.logprob for c in completions),
            seconds=seconds,
        )
        self._journal.append([figures.model_dump()])
        self.finished[shard] = figures
        return figures

    def publish(self, out: Path) -> None:
        """Copy the finished shards into the stage's directory."""
        for shard in sorted(self.finished):
            shutil.copyfile(self._folder / completions_file(shard), out / completions_file(shard))

    def close(self) -> None:
        self._journal.close()
