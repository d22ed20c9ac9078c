"""The statistics of the gate: numpy and scipy, no model, no file. Every function names its source.

limits          one-sided limits of rates and paired differences, McNemar, Holm
clusters        the same where prompts belong together
power           what a test of this size can see
bootstrap       figures that are no counts
length_control  win rates at equal length
bradley_terry   strengths of all policies of a run, with ties
"""

from __future__ import annotations

from dpo_loop.evaluation.statistics.limits import (
    clopper_pearson_limit,
    holm,
    mcnemar_p,
    tango_limit,
    wilson_interval,
    win_rate_limit,
)

__all__ = ["clopper_pearson_limit", "holm", "mcnemar_p", "tango_limit", "wilson_interval", "win_rate_limit"]
