"""What every config is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from dpo_loop.types import Record

Fraction = Annotated[float, Field(ge=0, le=1)]
ModuleFunction = Annotated[str, Field(pattern=r"^[\w.]+:\w+$", description="module:function, importable by the stage's process")]


class Settings(Record):
    """Base of every config: what people write. Infinity and NaN, which a measured figure may be, are refused."""

    model_config = ConfigDict(allow_inf_nan=False)
