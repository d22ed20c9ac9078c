"""How OpenMP's threads wait for one another: must be set before torch is imported, and is left to whoever has set it."""

from __future__ import annotations

import os

_SPINS = 10_000
"""About a third of a millisecond, longer than what lies between two operations of a training. Asleep a thread takes longest to come back: a pass of
train_vs_trl's 25M shape took 5.2 s with 20,000 spins, 5.5 s with 5,000 and 6.2 s with none, on two quiet cores. Two such passes beside each
other on these cores took 15, 11.4 and 10 s. libgomp's own 300,000 collapse there: SFT of the demo's size at a load of 5 to 10 fell from 5,600
tokens/s to between 65 and 900."""


def wait_briefly() -> None:
    """Spin a little, then sleep: libgomp reads GOMP_SPINCOUNT, other OpenMP libraries only OMP_WAIT_POLICY."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))  # which libgomp would prefer to somebody's policy
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
