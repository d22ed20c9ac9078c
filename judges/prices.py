"""What a call costs, in whole nano-dollars: a list of prices is a dated YAML file that the user can replace.

Integers, so that thousands of calls add up to what was reserved for them. Every rounding goes up.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from functools import cache
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from dpo_loop.config import Settings
from dpo_loop.errors import InputError
from dpo_loop.types import Usage

NANO = 1_000_000_000
"""Nano-dollars in a dollar."""
SHIPPED = Path(__file__).with_name("prices.yaml")


class Price(Settings):
    """US dollars per million tokens. cached_input None: the price of input. batch: the share that a batch API asks for."""

    input: float = Field(ge=0)
    cached_input: float | None = Field(None, ge=0)
    output: float = Field(ge=0)
    batch: float = Field(1.0, ge=0, le=1)

    def of(self, usage: Usage, *, at_batch_price: bool = False) -> int:
        """Nano-dollars."""
        cached = self.input if self.cached_input is None else self.cached_input
        per_million = (
            (usage.input_tokens - usage.cached_input_tokens) * to_nano(self.input)
            + usage.cached_input_tokens * to_nano(cached)
            + usage.output_tokens * to_nano(self.output)
        )
        return -(-per_million * (to_nano(self.batch) if at_batch_price else NANO) // (1_000_000 * NANO))

    def most(self, input_tokens: int, output_tokens: int, *, at_batch_price: bool = False) -> int:
        """Nano-dollars that a call of at most so many tokens can cost, however much of it the vendor has cached."""
        usage = Usage(input_tokens=input_tokens, output_tokens=output_tokens)
        all_cached = Usage(input_tokens=input_tokens, cached_input_tokens=input_tokens, output_tokens=output_tokens)
        return max(self.of(usage, at_batch_price=at_batch_price), self.of(all_cached, at_batch_price=at_batch_price))


FREE = Price(input=0, output=0)


class PriceList(Settings):
    """as_of: the day the figures were looked up."""

    as_of: date
    models: Mapping[str, Price]

    def of(self, model: str) -> Price:
        """Raises InputError for a model that is not listed."""
        if model not in self.models:
            raise InputError(
                f"the price of {model} is not known (the list is of {self.as_of} and has {', '.join(sorted(self.models))}). Ways out: put it in "
                f"a copy of {SHIPPED} and name that file in budget.prices, or say `free: true` in the judge if it costs nothing."
            )
        return self.models[model]


@cache
def load_prices(path: Path = SHIPPED) -> PriceList:
    """Raises InputError if the file is none."""
    try:
        return PriceList.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
    raise InputError(f"budget.prices: {path} is not a list of prices: {problem}. {SHIPPED} shows what one looks like.")


def to_nano(usd: float) -> int:
    return round(usd * NANO)


def to_usd(nano: int) -> float:
    return nano / NANO
