"""The options of ``utilization``: declared once for Python and the command line. Imports no torch."""

from __future__ import annotations

import os
from typing import Annotated, Literal, TypeAlias, TypedDict, get_args

from ..options import Option

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
    """The keywords of `neftsurgery.utilization`, which documents them; most are flags of ``report`` too."""

    states: Annotated[
        States,
        Option(
            "Compare with hidden states that enter the neuron's block or an earlier one (preceding), that "
            "leave its block or a later one (following), or with all. Default: preceding.",
            choices=get_args(States),
        ),
    ]
    strongly: Annotated[
        str | int | None,
        Option(
            "The rank change above which a neuron is strongly affected. Default: 28.4%, as in the paper.",
            metavar="N|P%",
        ),
    ]
    anatomy: Annotated[
        str | None,
        Option(
            "Which neurons are ranked. Default: ffn, and the kinds of weight that the patch changes.",
            choices=ANATOMIES,
        ),
    ]
    tokens: Annotated[
        int, Option(f"The largest number of tokens of the text. Default: {TOKENS}.", metavar="N")
    ]
    length: int | None
    batch: Annotated[
        int,
        Option(f"The number of tokens that go through the model at once. Default: {BATCH}.", metavar="N"),
    ]
    dtype: Annotated[
        str,
        Option(
            "What the model computes in. Default: auto, the dtype of its files.", choices=("auto", *DTYPES)
        ),
    ]
    device: Annotated[
        str, Option("Where the model runs: cpu, cuda. Default: a GPU if there is one.", metavar="NAME")
    ]
    out: str | os.PathLike[str] | None
    force: bool
