"""The options of the selection suite, and its scales."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.names import some_of
from benchmarks.selection.arms import ARMS
from benchmarks.selection.pretrained.options import PRECISIONS, arm_name
from benchmarks.selection.text import Sizes


@dataclass(frozen=True)
class Shape:
    """The model's shape: a Llama with tied embeddings and at most ``vocabulary`` tokens."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    vocabulary: int


@dataclass(frozen=True)
class Schedule:
    """AdamW without weight decay. The rate warms up linearly over a twentieth of the steps, then decays to 0.

    Batches have ``batch`` sequences. The dev loss is measured every ``evaluate_every`` steps, and the best
    state is kept. Training stops after ``patience`` measurements without a better one.
    """

    steps: int
    batch: int
    evaluate_every: int = 0
    patience: int = 0


@dataclass(frozen=True)
class Scale:
    """The scale of an experiment.

    Forgetting is measured on ``old`` examples of each pre-training task. ``exponents`` are the start and the
    bounds of every search for a learning rate. ``mixture`` is the number of batches of each pre-training
    task in turn: Chinese into English, English into Chinese, English, Chinese, articles.
    """

    shape: Shape
    text: Sizes
    pretrain: Schedule
    pretrain_rate: float
    tune: Schedule
    old: int
    piece: int  # tokens of a piece of an article
    answer: int  # most tokens of a translation
    exponents: tuple[int, int, int] = (4, -4, 9)
    mixture: tuple[int, ...] = (4, 2, 1, 1, 1)


SCALES = {
    "quick": Scale(
        Shape(32, 88, 2, 4, 600), Sizes(64, 16, 16, 8, 10), Schedule(12, 16), 3e-3,
        Schedule(6, 16, evaluate_every=3, patience=2), old=16, piece=16, answer=8, exponents=(2, 2, 3),
    ),
    "small": Scale(
        Shape(80, 216, 4, 4, 2000), Sizes(1500, 200, 300, 8, 10), Schedule(4000, 16), 3e-3,
        Schedule(120, 12, evaluate_every=30, patience=2), old=100, piece=24, answer=20,
    ),
    "medium": Scale(
        Shape(160, 432, 4, 4, 3000), Sizes(1600, 300, 400, 12, 16), Schedule(5000, 32), 2e-3,
        Schedule(400, 16, evaluate_every=50, patience=2), old=200, piece=32, answer=28, exponents=(2, -4, 9),
        mixture=(4, 1, 1, 2, 1),
    ),
    "large": Scale(
        Shape(512, 1408, 8, 8, 6000), Sizes(8000, 1000, 1500, 40, 60), Schedule(30_000, 128), 1e-3,
        Schedule(2000, 64, evaluate_every=100, patience=4), old=1000, piece=64, answer=80,
    ),
}  # fmt: skip
RATE = 1e-3  # learning rates are this times powers of two
STORED_AS = {"exponents": "rungs", "evaluate_every": "look"}  # keys in results files, kept for old ones
TASKS = ("translation", "plays")
QUICK_ARMS = ("base", "full", "neft-3", "random-3", "random-like-3", "lora-3", "units-9", "gradient-9")


@dataclass(frozen=True)
class Options:
    """``seeds`` runs of each arm in ``only``; no run starts after ``minutes``."""

    text: Path
    work: Path
    out: Path
    scale: str
    task: str
    device: str
    seeds: int
    only: tuple[str, ...]
    minutes: float
    threads: int
    workers: int
    command: str

    @classmethod
    def of(cls, given: argparse.Namespace) -> Options:
        """The options of a parsed command line."""
        named = {name: getattr(given, name) for name in cls.__dataclass_fields__ if name != "command"}
        scale = "quick" if given.quick else given.scale
        only = given.only or (QUICK_ARMS if given.quick else tuple(ARMS))
        flags = f" --task {given.task}" * (given.task != TASKS[0])
        flags += f" --device {given.device}" * (given.device != "cpu") + f" --seeds {given.seeds}"
        command = f"python -m benchmarks selection --text TEXT --scale {scale}{flags}"
        return cls(**named | {"scale": scale, "only": only, "command": command})

    @property
    def sizes(self) -> Scale:
        """The chosen scale."""
        return SCALES[self.scale]

    @property
    def results(self) -> Path:
        """The file of finished runs."""
        return self.out / f"selection-{self._named(self.task)}.jsonl"

    def _named(self, task: str) -> str:
        parts = [self.scale, *[task] * (task != TASKS[0]), *[self.device] * (self.device != "cpu")]
        return "-".join(parts)

    def describe(self, text: str) -> dict[str, Any]:
        """What must be equal for bases to be comparable, as JSON values. ``text`` is the text's digest."""
        sizes = json.loads(json.dumps(asdict(self.sizes)), object_hook=_stored)  # as it is read back
        return {"scale": self.scale, "device": self.device, "rate": RATE, **sizes, "text": text}

    def folder(self, text: str) -> Path:
        """The folder of the base and the probes. Each setting has its own; all tasks share it."""
        digest = hashlib.sha256(json.dumps(self.describe(text), sort_keys=True).encode()).hexdigest()
        return self.work / f"selection-{self._named(TASKS[0])}-{digest[:12]}"


def _stored(scale: dict[str, Any]) -> dict[str, Any]:
    return {STORED_AS.get(key, key): value for key, value in scale.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    add = parser.add_argument
    add(
        "--text",
        type=Path,
        default=Path("../shared/data/text"),
        help="the folder of sentence pairs and articles",
    )
    add("--work", type=Path, default=Path("build/selection"), help="folder for the base and the probes")
    add("--out", type=Path, default=Path("docs/results"), help="results, a line per run; the page is OUT.md")
    add("--scale", choices=SCALES, default="small", help="size of the experiment (default: small)")
    add("--task", choices=TASKS, default=TASKS[0], help="the task of fine-tuning (default: translation)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device (default: cpu)")
    add("--seeds", type=int, default=3, help="runs of each arm (default: 3)")
    add("--only", type=some_of(ARMS, "arm"), default=(), help=f"some of: {', '.join(ARMS)}")
    add(
        "--model",
        choices=("minilm", "smollm2"),
        help="a published model instead: sentences to classify, or problems to solve; at most 12 hours",
    )
    add("--tasks", type=lambda text: tuple(text.split(",")), default=(), help="some of the model's tasks")
    add(
        "--examples",
        type=lambda text: tuple(map(int, text.split(","))),
        default=(),
        help="with --model: only these sizes of the training set",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help=f"with --model: the type of matrix products (default: {PRECISIONS[0]})",
    )
    add("--schedules", action="store_true", help="with --model smollm2: the schedules of a recipe, not arms")
    add("--arms", type=arm_name, default=(), help="with --model: only these arms")
    add("--minutes", type=float, default=float("inf"), help="start no run after this; resume later")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1), help="torch threads per process")
    add("--workers", type=int, default=1, help="processes that run arms in parallel (default: 1)")
    add("--quick", action="store_true", help="smoke test: tiny, a few arms; the figures mean nothing")
