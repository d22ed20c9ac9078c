"""What judging may cost, as a user says it, and whose account it goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from dpo_loop.config import Settings
from judges.prices import SHIPPED, PriceList, load_prices


class BudgetConfig(Settings):
    """Caps; None is no cap. Raising one lets a run go on that it stopped: they are read anew whenever a stage starts."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"usd_per_run", "usd_per_round", "calls_per_run", "calls_per_round", "prices"})
    usd_per_run: float | None = Field(None, ge=0)
    usd_per_round: float | None = Field(None, ge=0)
    calls_per_run: int | None = Field(None, ge=0)
    calls_per_round: int | None = Field(None, ge=0)
    """Calls that were sent, attempts that were charged for nothing left out."""
    prices: str | None = None
    """A YAML file that replaces judges/prices.yaml."""

    def price_list(self) -> PriceList:
        """Raises InputError if the file is none."""
        return load_prices(SHIPPED if self.prices is None else Path(self.prices))


@dataclass(frozen=True, slots=True)
class Accounts:
    """What a stage that calls judges is bound to. It changes what is paid, never what is published. round_number None: of no round."""

    ledger: Path
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    round_number: int | None = None
