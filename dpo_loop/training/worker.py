"""One process of a training that `launch` started: `python -m dpo_loop.training.worker JOB.json`, under `accelerate launch`."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import torch.distributed as dist

from dpo_loop.errors import DpoLoopError
from dpo_loop.files import read_json, write_json
from dpo_loop.training.launch import OUTCOME, end_with, error_file
from dpo_loop.training.run import Job, train_adapter


def main(spec: Path) -> int:
    """Only the main process has lines to say. An error of ours is left beside the spec for the process that waits."""
    end_with(os.getppid())()
    index = int(os.environ["RANK"]) if "RANK" in os.environ else 0
    if index != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    job = read_json(spec, Job)
    try:
        outcome = train_adapter(job)
    except DpoLoopError as error:
        error_file(spec, index).write_bytes(pickle.dumps(error))
        return error.exit_code
    if index == 0:
        write_json(job.keep / OUTCOME, outcome)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
