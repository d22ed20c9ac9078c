"""The error tree. Every message says what is wrong, where, and the ways out.

    DpoLoopError                    exit 1
    ├── InputError                  exit 2    the user can mend it; nothing was started or lost
    │   ├── ConfigError                       all problems of a config, listed together
    │   ├── PromptFileError                   a line of a prompts file, with its number
    │   ├── PolicyError                       a model or adapter directory that cannot be used
    │   ├── StaleArtifactError                a published stage was made from other inputs
    │   ├── CorruptArtifactError              a published file differs from its recorded hash
    │   ├── StorageError                      disk full, directory read-only
    │   ├── BudgetExceededError               a call that would go over a cap was not made; resumes when the cap is raised
    │   ├── JudgeUnfitError                   a judge failed its self-test, so the round does not start
    │   └── DecisionError                     approve/reject of something that does not wait for it
    ├── BusyError                   exit 75   another process holds the stage or the run (retryable)
    ├── ServerUnavailableError      exit 75   the Prefect API that is configured does not answer (retryable)
    ├── JudgeError                  exit 2    a judge cannot go on: credentials, quota, unknown model
    │   └── JudgeUnavailableError   exit 75   outage, time-out, rate limit past the deadline (retryable)
    ├── StageFailedError            exit 1    a stage's process ended with an error; carries its exit code and last lines
    └── InvalidRoundError           exit 13   the round cannot be judged; the policy stays as it is
        ├── NoPairsError                      no preference pair survived; carries the counts
        ├── TrainingDivergedError             NaN or infinite loss, or a failed self-check of training
        └── CanaryError                       the engine does not serve the policy it was given

`retryable` says whether the same call may succeed later without a change by the user. All errors pickle.
"""

from __future__ import annotations


class DpoLoopError(Exception):
    """Base of every error that dpo-loop raises on purpose."""

    exit_code = 1
    retryable = False


class InputError(DpoLoopError):
    exit_code = 2


class ConfigError(InputError):
    """A configuration that cannot run.

    problems: one line each, opening with the dotted path of the key: `training.lr: must be greater than 0`.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        noun = "problem" if len(problems) == 1 else "problems"
        super().__init__("\n".join([f"{len(problems)} {noun} in the configuration:", *(f"  - {line}" for line in problems)]))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        return type(self), (self.problems,)


class PromptFileError(InputError):
    pass


class PolicyError(InputError):
    pass


class StaleArtifactError(InputError):
    pass


class CorruptArtifactError(InputError):
    pass


class StorageError(InputError):
    pass


class BudgetExceededError(InputError):
    pass


class JudgeUnfitError(InputError):
    pass


class DecisionError(InputError):
    pass


class BusyError(DpoLoopError):
    exit_code = 75
    retryable = True


class ServerUnavailableError(DpoLoopError):
    exit_code = 75
    retryable = True


class JudgeError(DpoLoopError):
    exit_code = 2


class JudgeUnavailableError(JudgeError):
    exit_code = 75
    retryable = True


class StageFailedError(DpoLoopError):
    """A stage's child process ended with an error that it did not explain.

    returncode: of the process; negative for a signal is mapped to 128 + n. tail: last lines of its log.
    """

    def __init__(self, stage: str, returncode: int, tail: str) -> None:
        self.stage, self.returncode, self.tail = stage, returncode, tail
        self.retryable = returncode in (75, 137, 143)
        super().__init__(f"stage {stage} ended with exit code {returncode}; the end of its log:\n{tail}")

    def __reduce__(self) -> tuple[type[StageFailedError], tuple[str, int, str]]:
        return type(self), (self.stage, self.returncode, self.tail)


class InvalidRoundError(DpoLoopError):
    exit_code = 13


class NoPairsError(InvalidRoundError):
    pass


class TrainingDivergedError(InvalidRoundError):
    pass


class CanaryError(InvalidRoundError):
    pass
