"""The settings of each model's experiment, and its options."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.selection.pretrained.arms import ARMS

RATE = 1e-3  # learning rates are this times powers of two
HEAD_RATE = 1e-3  # of a classifier's head, in every arm
SCHEDULES: dict[str, dict[str, float]] = {  # of a recipe
    "fixed": {},
    "backward": {"backward": 0.5},
    "regrow": {"regrow": 0.3, "regrow_every": 10, "regrow_batches": 4},
}
PRECISIONS = ("float32", "bfloat16")  # of matrix products; weights and optimizers have float32


@dataclass(frozen=True)
class Setting:
    """An experiment on one model.

    ``examples``: how many to train on, the sizes of the experiment; ``dev`` and ``test``: how many to measure
    on, of at most ``length`` tokens, after the steps ``looks``. ``starts``: where the search for the rate of
    an arm begins, as an exponent, by kind of arm or anatomy.
    """

    tasks: tuple[str, ...]
    examples: tuple[int, ...]
    dev: int
    test: int
    length: int
    batch: int
    looks: tuple[int, ...]
    probe_batches: int
    starts: dict[str, int]
    arms: tuple[str, ...] = ()  # None: all, and the best candidates

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.looks[-1]


_STARTS = {"full": -4, "lora": 0, "shira": 0, "bitfit": 2, "rows": 0, "units": 1}
SETTINGS = {
    "minilm": Setting(
        ("trec", "sst2", "subj", "cr"), (1600, 48), 128, 320, 24, 16, (10, 30, 100), 30, _STARTS
    ),
    "smollm2": Setting(
        ("gsm8k",), (240,), 24, 48, 128, 4, (10, 30, 60), 10,
        {"full": -5, "lora": 0, "rows": 1, "units": 0},
        arms=("full", "lora", "rows-random", "units-random"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PretrainedOptions:
    """What to run: ``only`` some arms, on some tasks; no run starts after ``minutes``."""

    model: str
    text: Path
    work: Path
    out: Path
    tasks: tuple[str, ...]
    examples: tuple[int, ...]
    only: tuple[str, ...]
    seeds: int
    device: str
    threads: int
    minutes: float
    quick: bool
    precision: str = PRECISIONS[0]

    @classmethod
    def of(cls, given: argparse.Namespace) -> PretrainedOptions:
        """The options of a parsed command line."""
        named = {name: getattr(given, name) for name in cls.__dataclass_fields__ if name != "only"}
        setting = SETTINGS[given.model]
        counts = () if given.quick else given.examples
        return cls(**named | {"tasks": given.tasks or setting.tasks, "examples": counts, "only": given.arms})

    @property
    def setting(self) -> Setting:
        """The experiment; a tiny one if it is ``quick``."""
        setting = SETTINGS[self.model]
        if not self.quick:
            return setting
        return replace(setting, examples=(8,), dev=4, test=4, batch=4, looks=(1, 2), probe_batches=1)

    @property
    def results(self) -> Path:
        """The file of finished runs."""
        return self.out / f"pretrained-{self.model}.jsonl"

    @property
    def command(self) -> str:
        """What makes the results."""
        flag = f" --precision {self.precision}" * (self.precision != PRECISIONS[0])
        return f"python -m benchmarks selection --model {self.model} --text TEXT{flag}"

    @property
    def schedule_results(self) -> Path:
        """The file of finished runs with schedules."""
        return self.out / f"schedules-{self.model}.jsonl"

    @property
    def schedule_steps(self) -> int:
        """Optimizer steps of a run with a schedule."""
        return 3 if self.quick else 40

    @property
    def schedule_command(self) -> str:
        """What makes the runs with schedules."""
        return f"python -m benchmarks selection --model {self.model} --schedules --text TEXT"

    def describe(self) -> dict[str, Any]:
        """What must be equal for runs to be comparable, as JSON values."""
        one = asdict(self.setting)
        kept = ("dev", "test", "length", "batch", "looks", "probe_batches")
        facts = {"model": self.model, "device": self.device, "precision": self.precision}
        return (
            facts
            | {"rate": RATE, "head_rate": HEAD_RATE}
            | {name: list(one[name]) if isinstance(one[name], tuple) else one[name] for name in kept}
        )


def arm_name(text: str) -> tuple[str, ...]:
    """Some of the arms of these experiments, from a command line."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in ARMS]:
        raise argparse.ArgumentTypeError(f"there is no arm {unknown[0]!r}: known ones are {', '.join(ARMS)}")
    return names
