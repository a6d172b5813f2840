"""The arms of the experiment: what each one trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["base", "full", "lora", "shira", "bitfit", "neurons"]
Role = Literal["ours", "control", "rival"]
CONTROL_SIZES = ("3", "9")  # sizes with controls; like all sizes, in percent of the model's parameters
SIZES = ("0.4", "1.5", "3", "6", "9", "12")  # the paper's sizes
GRADIENT_SCORES = ("gradient", "fisher", "gradient_over_weight")
LORA_SIZES = ("1.5", "3", "9", "30")  # of LoRA, which gets the nearest rank


@dataclass(frozen=True)
class Arm:
    """An arm of the experiment."""

    name: str  # its name in results and on the command line
    kind: Kind
    role: Role
    label: str  # its name in tables
    # Its size in percent of all parameters of the model, as the paper counts; None if it has no such size.
    # Adapters get the rank that comes nearest.
    percent: str | None = None
    anatomy: str = "rows"
    # A score of `neftsurgery.diff` between the base and the probe; or of the base's gradients, without a
    # probe.
    score: str = "cosine"
    policy: str = "sensitive"
    # Whether each tensor gets as many neurons as the sensitive selection of the same size has in it. The arm
    # then differs in which neurons are chosen, not in where.
    same_counts: bool = False

    @property
    def needs_probe(self) -> bool:
        """Whether it needs the scores of a full fine-tune, if only to count neurons."""
        return self.kind == "neurons" and self.score not in GRADIENT_SCORES

    @property
    def random_control(self) -> str | None:
        """The arm with random neurons of the same size; None if there is none, and for that arm itself."""
        random = f"random-{self.percent}"
        return random if self.percent in CONTROL_SIZES and self.name != random else None


def _chosen(name: str, percent: str) -> Arm:
    """The arm that trains neurons chosen by the method ``name``, at one size."""
    role, label, options = _CHOICES[name]
    return Arm(f"{name}-{percent}", "neurons", role, label, percent, **options)


_CHOICES: dict[str, tuple[Role, str, dict[str, Any]]] = {
    "neft": ("ours", "NeFT: sensitive rows", {}),
    "random": ("control", "random rows", {"policy": "random"}),
    "random-like": (
        "control", "random rows, as many per tensor as NeFT", {"policy": "random", "same_counts": True},
    ),
    "reversed": ("control", "least sensitive rows", {"policy": "reversed"}),
    "least-like": (
        "control", "least sensitive rows, as many per tensor as NeFT",
        {"policy": "reversed", "same_counts": True},
    ),
    "norm": ("control", "rows of lowest norm", {"score": "norm"}),
    "gradient": ("ours", "rows by gradient signs", {"score": "gradient"}),
    "fisher": ("control", "rows by squared gradients", {"score": "fisher"}),
    "ffn": ("ours", "sensitive, anatomy ffn (the paper's)", {"anatomy": "ffn"}),
    "units": ("ours", "sensitive, anatomy units", {"anatomy": "units"}),
    "units-gradient": (
        "ours", "units by gradient signs", {"anatomy": "units", "score": "gradient"},
    ),
    "units-fisher": ("control", "units by squared gradients", {"anatomy": "units", "score": "fisher"}),
    "ffn-random": ("control", "random, anatomy ffn", {"anatomy": "ffn", "policy": "random"}),
    "units-random": ("control", "random, anatomy units", {"anatomy": "units", "policy": "random"}),
}  # fmt: skip


def _lora(percent: str) -> Arm:
    return Arm(f"lora-{percent}", "lora", "rival", "LoRA", percent)


def _all_arms() -> Iterator[Arm]:
    """The most informative arms first: a run with too little time leaves out the last ones."""
    yield Arm("base", "base", "rival", "base, untuned")
    yield Arm("full", "full", "rival", "full fine-tune")
    for name in ("neft", "random", "random-like", "reversed"):
        yield from (_chosen(name, percent) for percent in CONTROL_SIZES)
    yield from (_lora(percent) for percent in CONTROL_SIZES)
    for name in ("ffn", "units", "gradient", "fisher", "least-like", "norm"):
        yield from (_chosen(name, percent) for percent in CONTROL_SIZES)
    yield from (_chosen("neft", percent) for percent in SIZES if percent not in CONTROL_SIZES)
    yield from (_lora(percent) for percent in LORA_SIZES if percent not in CONTROL_SIZES)
    for name in ("ffn-random", "units-random", "units-gradient", "units-fisher"):
        yield from (_chosen(name, percent) for percent in CONTROL_SIZES)
    yield Arm("linear", "neurons", "rival", "all rows of the linear layers")


ARMS = {arm.name: arm for arm in _all_arms()}
