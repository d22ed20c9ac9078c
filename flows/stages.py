"""The stages by name, as they are now. A room is imported when its stage is asked for, so that a command loads only what it needs."""

from __future__ import annotations

from dpo_loop.artifacts import Stage
from dpo_loop.errors import InputError
from dpo_loop.exchange import SEED_VERSION, TRAIN_VERSION
from dpo_loop.layout import RunDir
from judges.accounts import Accounts


def stage_of(run: RunDir, name: str, *, invalid: bool, accounts: Accounts | None = None) -> Stage:
    """Raises InputError for a name that is none. invalid: the gate of a round that cannot be judged. accounts: of the round's
    judging; left out, there is no cap, as for a look at the stage's version."""
    match name:
        case "world":
            from dpo_loop.quickstart.stage import WORLD

            return WORLD
        case "seed":
            from dpo_loop.training.seed import SEED

            return SEED
        case "evalset":
            from dpo_loop.prompts.stage import EVALSET

            return EVALSET
        case "reserve":
            from dpo_loop.prompts.stage import RESERVE

            return RESERVE
        case "prompts":
            from dpo_loop.prompts.stage import PROMPTS

            return PROMPTS
        case "generate":
            from dpo_loop.generation.stage import GENERATE

            return GENERATE
        case "judge":
            from judges.stage import judge_stage

            return judge_stage(accounts or Accounts(run.ledger))
        case "judgetest":
            from judges.selftest.stage import judgetest_stage

            return judgetest_stage(accounts or Accounts(run.ledger))
        case "pair":
            from dpo_loop.pairing.stage import PAIR

            return PAIR
        case "train":
            from dpo_loop.training.stage import TRAIN

            return TRAIN
        case "answer" | "answer_again" | "more_candidate" | "more_previous" | "more_anchor":
            from dpo_loop.generation.stage import ANSWER

            return ANSWER
        case "grade" | "grade_again" | "grade_more":
            from judges.grading import grade_stage

            return grade_stage(accounts or Accounts(run.ledger))
        case "capability":
            from dpo_loop.generation.capability import CAPABILITY

            return CAPABILITY
        case "look":
            from dpo_loop.evaluation.stage import LOOK

            return LOOK
        case "gate":
            from dpo_loop.evaluation.stage import GATE, GATE_INVALID

            return GATE_INVALID if invalid else GATE
        case "report":
            from dpo_loop.reporting.stage import REPORT

            return REPORT
    raise InputError(f"there is no stage {name}")


def version_of(run: RunDir, name: str, *, invalid: bool) -> int:
    """Of the stage as it is now, without the seconds that loading torch takes."""
    if name in ("seed", "train"):
        return SEED_VERSION if name == "seed" else TRAIN_VERSION
    return stage_of(run, name, invalid=invalid).version
