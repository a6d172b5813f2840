"""The options of the suite on quantized checkpoints."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.names import some_of
from benchmarks.harness.sizes import format_size, parse_size

RESULTS = "quantized.json"
LAYOUTS = {"fp8": "FP8 in blocks of 128 x 128, as DeepSeek stores it", "mxfp4": "MXFP4, as gpt-oss stores it"}
QUICK = {"size": "20MB", "repeat": 1}


@dataclass(frozen=True)
class Options:
    """``size``: bytes per side; ``repeat``: rounds; ``rivals``: whether torch takes turns too."""

    size: int
    threads: int
    repeat: int
    rivals: bool
    only: tuple[str, ...]
    work: Path | None
    out: Path

    @classmethod
    def of(cls, given: argparse.Namespace) -> Options:
        """The options of a parsed command line."""
        return cls(**{name: getattr(given, name) for name in cls.__dataclass_fields__})

    def command(self, layout: str) -> str:
        """The command line that measures this layout again."""
        size = format_size(self.size).replace(" ", "")
        flags = f"--only {layout} --size {size} --threads {self.threads} --repeat {self.repeat}"
        return f"python -m benchmarks quantized {flags}" + ("" if self.rivals else " --no-rivals")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    add = parser.add_argument
    add("--size", type=parse_size, default="2GB", help="bytes per side (default: 2GB)")
    add("--threads", type=int, default=2, help="this tool's threads where files are cached (default: 2)")
    add("--repeat", type=int, default=5, help="rounds (default: 5); torch, which takes minutes, has one")
    add("--no-rivals", dest="rivals", action="store_false", help="measure only this tool and the reads")
    add(
        "--only",
        type=some_of(LAYOUTS, "layout"),
        default=tuple(LAYOUTS),
        help=f"some of: {', '.join(LAYOUTS)}",
    )
    add("--quick", action="store_true", help="smoke test: megabytes, one round; the figures mean nothing")
    add("--work", type=Path, help="folder for temporary checkpoints (default: the temporary folder)")
    add("--out", type=Path, default=Path("docs/benchmarks"), help="results; the page is OUT-quantized.md")
