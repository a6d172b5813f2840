"""What is compared: an arm is a way to choose what is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["base", "full", "lora", "neurons"]
Role = Literal["ours", "control", "rival"]
CONTROLLED = ("3", "9")  # percent at which there are controls
SIZES = ("0.4", "1.5", "3", "6", "9", "12")  # the paper's
LIVE = ("gradient", "fisher")  # scores of gradients
ADAPTED = ("1.5", "3", "9", "30")  # LoRA, at the rank that comes nearest


@dataclass(frozen=True)
class Arm:
    """An arm of the comparison.

    Attributes
    ----------
    name:
        In results and on the command line.
    words:
        For the table.
    percent:
        Of all parameters of the model, as the paper counts; None where that is not how it is chosen. Of
        adapters: what their rank comes nearest to.
    score:
        Of `neftsurgery.diff`, between the base and the probe; or of the base's gradients, without a probe.
    alike:
        Whether every tensor has as many neurons as the sensitive ones of the same size have in it: what
        is left to choose is which, not where.
    """

    name: str
    kind: Kind
    role: Role
    words: str
    percent: str | None = None
    anatomy: str = "rows"
    score: str = "cosine"
    policy: str = "sensitive"
    alike: bool = False

    @property
    def probed(self) -> bool:
        """Whether it needs the scores of what a full fine-tune changed, be it only to count neurons."""
        return self.kind == "neurons" and self.score not in LIVE

    @property
    def against(self) -> str | None:
        """The arm of random neurons of the same size, where there is one and this is another."""
        random = f"random-{self.percent}"
        return random if self.percent in CONTROLLED and self.name != random else None


def _chosen(name: str, percent: str) -> Arm:
    """Neurons of one size, chosen in the way that ``name`` says."""
    role, words, how = _WAYS[name]
    return Arm(f"{name}-{percent}", "neurons", role, words, percent, **how)


_WAYS: dict[str, tuple[Role, str, dict[str, Any]]] = {
    "neft": ("ours", "NeFT: sensitive rows", {}),
    "random": ("control", "random rows", {"policy": "random"}),
    "random-like": (
        "control", "random rows, as many per tensor as NeFT", {"policy": "random", "alike": True},
    ),
    "reversed": ("control", "least sensitive rows", {"policy": "reversed"}),
    "least-like": (
        "control", "least sensitive rows, as many per tensor as NeFT", {"policy": "reversed", "alike": True},
    ),
    "norm": ("control", "rows of lowest norm", {"score": "norm"}),
    "gradient": ("ours", "rows that gradients agree to turn", {"score": "gradient"}),
    "fisher": ("control", "rows of largest gradients", {"score": "fisher"}),
    "ffn": ("ours", "sensitive, anatomy ffn (the paper's)", {"anatomy": "ffn"}),
    "units": ("ours", "sensitive, anatomy units", {"anatomy": "units"}),
    "units-gradient": (
        "ours", "units that gradients agree to turn", {"anatomy": "units", "score": "gradient"},
    ),
    "units-fisher": ("control", "units of largest gradients", {"anatomy": "units", "score": "fisher"}),
    "ffn-random": ("control", "random, anatomy ffn", {"anatomy": "ffn", "policy": "random"}),
    "units-random": ("control", "random, anatomy units", {"anatomy": "units", "policy": "random"}),
}  # fmt: skip


def _lora(percent: str) -> Arm:
    return Arm(f"lora-{percent}", "lora", "rival", "LoRA", percent)


def _in_order() -> Iterator[Arm]:
    """The most telling first: a run that is short of time leaves out the last."""
    yield Arm("base", "base", "rival", "base, untuned")
    yield Arm("full", "full", "rival", "full fine-tune")
    for name in ("neft", "random", "random-like", "reversed"):
        yield from (_chosen(name, percent) for percent in CONTROLLED)
    yield from (_lora(percent) for percent in CONTROLLED)
    for name in ("ffn", "units", "gradient", "fisher", "least-like", "norm"):
        yield from (_chosen(name, percent) for percent in CONTROLLED)
    yield from (_chosen("neft", percent) for percent in SIZES if percent not in CONTROLLED)
    yield from (_lora(percent) for percent in ADAPTED if percent not in CONTROLLED)
    for name in ("ffn-random", "units-random", "units-gradient", "units-fisher"):
        yield from (_chosen(name, percent) for percent in CONTROLLED)
    yield Arm("linear", "neurons", "rival", "all rows of the linear layers")


ARMS = {arm.name: arm for arm in _in_order()}
