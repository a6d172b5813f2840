"""The options of the training suite, and its contestants."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.names import some_of

# Hidden size, feed-forward size, attention heads, key/value heads, vocabulary.
SHAPES = {
    "tiny": (64, 160, 4, 4, 256),
    "small": (768, 2048, 12, 12, 4_096),
    "llama-1b": (2048, 8192, 32, 8, 128_256),
    "llama-7b": (4096, 11008, 32, 32, 32_000),
    "moe-tiny": (64, 32, 4, 4, 256),
    "moe": (1024, 512, 16, 4, 4_096),  # the feed-forward size is that of an expert
}
EXPERTS = {"moe-tiny": (8, 2), "moe": (32, 4)}  # of a Qwen3-MoE: how many, and how many a token visits
DTYPES = ("fp32", "bf16")

# Name: role and label. A number in a name is the share of rows in percent, which decides the size.
CONTESTANTS = {
    "floor": ("limit", "frozen floor: forward and input gradients only"),
    "neft-1": ("ours", "NeFT, 1% of rows"),
    "neft-3": ("ours", "NeFT, 3% of rows"),
    "neft-9": ("ours", "NeFT, 9% of rows"),
    "units-3": ("ours", "NeFT, as many parameters in whole feed-forward units"),
    "overlay-3": ("ours", "NeFT, 3% of rows, overlay"),
    "masked-3": ("rival", "full gradients, masked to 3% of rows"),
    "full": ("rival", "full fine-tune of the same modules"),
    "lora-1": ("rival", "PEFT LoRA, parameters as NeFT 1%"),
    "lora-3": ("rival", "PEFT LoRA, parameters as NeFT 3%"),
    "lora-9": ("rival", "PEFT LoRA, parameters as NeFT 9%"),
    "peft-3": ("ours", "NeFT as a PEFT method, 3% of rows"),
    "shira-3": ("rival", "PEFT SHiRA, parameters as NeFT 3%"),
    "supertuning-3": ("rival", "PEFT SUPERTUNING, parameters as NeFT 3%"),
    "miss-3": ("rival", "PEFT MiSS, parameters as NeFT 3%"),
    "tokens-neft": ("ours", "NeFT, 3% of the embedding's entries"),
    "tokens-peft": ("rival", "PEFT TrainableTokens, the same entries"),
}
# Those of a mixture of experts: the experts alone are trained.
MIXTURE_CONTESTANTS = {
    "experts_floor": ("limit", "frozen floor: forward and input gradients only"),
    "experts-3": ("ours", "NeFT, 3% of the experts' rows"),
    "experts_peft-3": ("ours", "NeFT as a PEFT method, 3% of the experts' rows"),
    "experts_lora-3": ("rival", "PEFT LoRA on the experts' parameters, as many of them"),
    "experts_full": ("rival", "full gradients of the experts"),
}
ALL_CONTESTANTS = CONTESTANTS | MIXTURE_CONTESTANTS
USUAL = (4, 128)  # sequences per step, and tokens of each
QUICK = {"shape": "tiny", "layers": 2, "batch": 2, "length": 16, "rounds": 2, "steps": 1}


def contestants(shape: str) -> tuple[str, ...]:
    """Those that train a model of this shape."""
    return tuple(MIXTURE_CONTESTANTS if shape in EXPERTS else CONTESTANTS)


@dataclass(frozen=True)
class Options:
    """Each contestant takes ``rounds`` turns of ``steps`` steps on ``batch`` x ``length`` tokens."""

    device: str
    dtype: str
    shape: str
    layers: int
    batch: int
    length: int
    rounds: int
    steps: int
    checkpointing: bool
    only: tuple[str, ...]
    out: Path

    @classmethod
    def of(cls, given: argparse.Namespace) -> Options:
        """The options of a parsed command line."""
        values = {name: getattr(given, name) for name in cls.__dataclass_fields__}
        return cls(**values | {"only": values["only"] or contestants(values["shape"])})

    @property
    def part(self) -> str:
        """The result's name in the results file, one for each setting."""
        checkpointing = " checkpointing" if self.checkpointing else ""
        usual = (self.batch, self.length) == USUAL
        tokens = "" if usual else f" {self.batch} x {self.length}"
        return f"{self.device} {self.shape} x {self.layers} {self.dtype}{tokens}{checkpointing}"

    def command(self) -> str:
        """The command line that measures this again."""
        names = ("device", "dtype", "shape", "layers", "batch", "length", "rounds", "steps")
        flags = [f"--{name} {getattr(self, name)}" for name in names]
        flags += ["--checkpointing"] * self.checkpointing
        if self.only != contestants(self.shape):
            flags.append(f"--only {','.join(self.only)}")
        return " ".join(["python -m benchmarks training", *flags])

    def job(self, contestant: str) -> dict[str, Any]:
        """The job of a worker, as JSON values."""
        kept = ("device", "dtype", "shape", "layers", "batch", "length", "checkpointing")
        return {"contestant": contestant} | {key: value for key, value in asdict(self).items() if key in kept}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device (default: cpu)")
    add("--dtype", choices=DTYPES, default="fp32", help="dtype of the frozen weights (default: fp32)")
    add("--shape", choices=SHAPES, default="small", help="shape of the model's layers (default: small)")
    add("--layers", type=int, default=4, help="number of layers (default: 4)")
    add("--batch", type=int, default=USUAL[0], help=f"sequences per step (default: {USUAL[0]})")
    add("--length", type=int, default=USUAL[1], help=f"tokens per sequence (default: {USUAL[1]})")
    add("--rounds", type=int, default=7, help="turns of each contestant (default: 7)")
    add("--steps", type=int, default=2, help="steps per turn (default: 2)")
    add("--checkpointing", action="store_true", help="gradient checkpointing, for all")
    add(
        "--only",
        type=some_of(ALL_CONTESTANTS, "contestant"),
        default=(),
        help=f"some of: {', '.join(ALL_CONTESTANTS)}",
    )
    add("--quick", action="store_true", help="smoke test: tiny, two rounds; the figures mean nothing")
    add("--out", type=Path, default=Path("docs/benchmarks"), help="results; the page is OUT-training.md")
