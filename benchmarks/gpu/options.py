"""The options of the run on a GPU, and its steps."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.training.options import DTYPES, EXPERTS, SHAPES

RESULTS = "gpu.json"
QUICK = {"shape": "tiny", "layers": 2}
# Those of longer sequences: few enough that all of them fit one GPU.
LONG = ("floor", "neft-3", "units-3", "overlay-3", "peft-3", "lora-3", "masked-3")


@dataclass(frozen=True)
class Step:
    """A process of the run, and the seconds that it may take."""

    name: str
    command: tuple[str, ...]
    limit: int


@dataclass(frozen=True)
class Options:
    """The device, and the model of the two benchmarks."""

    device: str
    dtype: str
    shape: str
    layers: int
    quick: bool
    out: Path

    @classmethod
    def of(cls, given: argparse.Namespace) -> Options:
        """The options of a parsed command line."""
        return cls(**{name: getattr(given, name) for name in cls.__dataclass_fields__})

    def command(self) -> str:
        """The command line that runs this again."""
        names = ("device", "dtype", "shape", "layers")
        flags = [f"--{name} {getattr(self, name)}" for name in names] + ["--quick"] * self.quick
        return " ".join(["python -m benchmarks gpu", *flags])

    def steps(self) -> tuple[Step, ...]:
        """What is run, in this order; at most eight minutes together."""
        python = (sys.executable, "-m")
        model = ("--device", self.device, "--dtype", self.dtype, "--shape", self.shape)
        model += ("--layers", str(self.layers), "--out", str(self.out))
        rounds = ("--rounds", "2") if self.quick else ()
        batch, length = (2, 32) if self.quick else (4, 1024)
        long = ("--batch", str(batch), "--length", str(length), "--only", ",".join(LONG))
        report = ("-p", "no:cacheprovider", f"--junitxml={self.out / 'tests.xml'}")
        return (
            Step("tests", (*python, "pytest", "-q", "-m", "cuda", "tests/cuda", *report), 150),
            Step("training", (*python, "benchmarks", "training", *model, *rounds), 150),
            Step("long", (*python, "benchmarks", "training", *model, *rounds, *long), 100),
            Step("switch", (*python, "benchmarks", "switch", *model, *rounds), 60),
        )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run's own options."""
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try all steps without a GPU")
    add("--dtype", choices=DTYPES, default="bf16", help="dtype of the frozen weights (default: bf16)")
    add(
        "--shape",
        choices=[one for one in SHAPES if one not in EXPERTS],
        default="llama-7b",
        help="shape of the model's layers (default: llama-7b)",
    )
    add("--layers", type=int, default=4, help="number of layers (default: 4)")
    add("--quick", action="store_true", help="smoke test: tiny, two rounds; the figures mean nothing")
    add("--out", type=Path, default=Path("build/gpu"), help="results; the page is OUT.md")
