"""The options of ``utilization``: declared once for Python and the command line. Imports no torch."""

from __future__ import annotations

import os
from typing import Literal, TypeAlias, TypedDict

__all__ = ["ANATOMIES", "BATCH", "DTYPES", "LENGTH", "TOKENS", "States", "UtilizationOptions"]

States: TypeAlias = Literal["preceding", "following", "all"]
"""Which hidden states a neuron is compared with: those that enter its block or an earlier one, those that
leave its block or a later one, or all."""

ANATOMIES = ("ffn", "rows")
DTYPES = ("float64", "float32", "float16", "bfloat16")
"""What a model may compute in, in addition to ``auto``: the dtype of its files."""

TOKENS = 32_768
LENGTH = 512
BATCH = 4096


class UtilizationOptions(TypedDict, total=False):
    """The keywords of `neftsurgery.utilization`, which documents them."""

    anatomy: str | None
    states: States
    strongly: str | int | None
    tokens: int
    length: int | None
    batch: int
    dtype: str
    device: str
    out: str | os.PathLike[str] | None
    force: bool
