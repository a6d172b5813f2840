"""The options of the switch suite."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.training.options import DTYPES, EXPERTS, SHAPES

RESULTS = "switch.json"
QUICK = {"shape": "tiny", "layers": 2, "rounds": 2}


@dataclass(frozen=True)
class Options:
    """Two patches of ``share`` percent of the rows of each linear layer are switched ``rounds`` times."""

    device: str
    dtype: str
    shape: str
    layers: int
    share: float
    rounds: int
    out: Path

    @classmethod
    def of(cls, given: argparse.Namespace) -> Options:
        """The options of a parsed command line."""
        return cls(**{name: getattr(given, name) for name in cls.__dataclass_fields__})

    @property
    def part(self) -> str:
        """The result's name in the results file, one for each setting."""
        return f"{self.device} {self.shape} x {self.layers} {self.dtype}"

    def command(self) -> str:
        """The command line that measures this again."""
        names = ("device", "dtype", "shape", "layers", "share", "rounds")
        return " ".join(["python -m benchmarks switch", *(f"--{n} {getattr(self, n):}" for n in names)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device (default: cpu)")
    add("--dtype", choices=DTYPES, default="bf16", help="dtype of the weights (default: bf16)")
    add(
        "--shape",
        choices=[one for one in SHAPES if one not in EXPERTS],
        default="small",
        help="shape of the model's layers (default: small)",
    )
    add("--layers", type=int, default=4, help="number of layers (default: 4)")
    add("--share", type=float, default=3.0, help="percent of the rows (default: 3)")
    add("--rounds", type=int, default=15, help="turns of each contestant (default: 15)")
    add("--quick", action="store_true", help="smoke test: tiny, two rounds; the figures mean nothing")
    add("--out", type=Path, default=Path("docs/benchmarks"), help="results; the page is OUT-training.md")
