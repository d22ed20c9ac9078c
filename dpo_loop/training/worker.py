"""One process of a training that `launch` started: `python -m dpo_loop.training.worker JOB.json`, under `accelerate launch`."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

from dpo_loop.artifacts import storage_errors
from dpo_loop.errors import DpoLoopError, StageFailedError
from dpo_loop.files import read_json, write_json
from dpo_loop.training.launch import OUTCOME, end_with, leave_word
from dpo_loop.training.run import Job, train_adapter


def main(spec: Path) -> int:
    """Only the main process has lines to say. What it ends with is left beside the spec for the process that waits: an error of ours as it
    is, another exception as a StageFailedError with its traceback."""
    end_with(os.getppid())()
    index = int(os.environ["RANK"]) if "RANK" in os.environ else 0
    if index != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        job = read_json(spec, Job)
        with storage_errors(job.out):
            outcome = train_adapter(job)
            if index == 0:
                write_json(job.keep / OUTCOME, outcome)
    except Exception as error:
        word = error if isinstance(error, DpoLoopError) else _unexpected(error, index)
        leave_word(spec, index, word)
        return word.exit_code
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _unexpected(error: Exception, index: int) -> StageFailedError:
    return StageFailedError("train", 1, f"in process {index}:\n{''.join(traceback.format_exception(error))}")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
