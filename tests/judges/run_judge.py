"""The judge stage as a process of its own, to be killed: python -m tests.judges.run_judge RUN JUDGE_JSON."""

from __future__ import annotations

import sys
from pathlib import Path

from dpo_loop.artifacts import materialize
from judges.accounts import Accounts
from judges.config import OpenAICompatibleJudge
from judges.stage import judge_stage

if __name__ == "__main__":
    run = Path(sys.argv[1])
    materialize(
        judge_stage(Accounts(run / "ledger.sqlite")),
        run / "judge",
        prompts=run / "prompts",
        completions=run / "generate",
        judge=OpenAICompatibleJudge.model_validate_json(sys.argv[2]),
        seed=0,
    )
