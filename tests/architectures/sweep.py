"""The table read back: what the anatomies say of the files of every model, beside what is live."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neftsurgery.errors import NeftError
from neftsurgery.neurons.anatomy import read_anatomy
from neftsurgery.neurons.families import SHARED, architectures
from neftsurgery.tensors.header import TensorInfo

from .live_weights import ORDERS

__all__ = ["Outcome", "PAGE", "put_page", "read_back"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
_START, _END = "<!-- made by `make architectures` -->", "<!-- end -->"


@dataclass
class Outcome:
    """Of one model type: counts of tensors of two axes or more, and what is offered."""

    tensors: Counter[str] = field(default_factory=Counter)  # right, refused, wrong
    examples: dict[str, str] = field(default_factory=dict)
    ffn: bool = False
    units: bool = False

    @property
    def verdict(self) -> str:
        """The worst of its tensors."""
        return next(
            (name for name in ("wrong", "refused", "by hand", "right") if self.tensors[name]), "no weights"
        )


def read_back(models: Mapping[str, Mapping[str, Any]], by_hand: Collection[str] = ()) -> Outcome:
    """Read the files of each class of one model type; ``by_hand`` are patterns that stand in the overlay."""
    outcome = Outcome()
    for model in models.values():
        infos = {name: TensorInfo(name, "F32", tuple(shape)) for name, (shape, _) in model["tensors"].items()}
        anatomy = read_anatomy("rows", infos, model["config"])
        axes = {tensor.info.name: tensor.axes for tensor in anatomy.scored}
        reasons = {entry.info.name: entry.reason for entry in anatomy.listed}
        for name, (shape, verdict) in model["tensors"].items():
            if len(shape) < 2 or reasons.get(name) in ("one element wide", "no elements"):
                continue
            said = _judge(verdict, axes.get(name))
            if said == "wrong" and verdict not in ORDERS and name.endswith(tuple(by_hand)):
                said = "by hand"
            outcome.tensors[said] += 1
            outcome.examples.setdefault(
                said, f"{name} {shape}: {verdict}, read as {axes.get(name) or reasons.get(name)}"
            )
        for offered in ("ffn", "units"):
            try:
                scored = read_anatomy(offered, infos, model["config"]).scored
            except NeftError:
                continue
            setattr(outcome, offered, getattr(outcome, offered) or bool(scored))
    return outcome


def _judge(verdict: str, axes: tuple[int, ...] | None) -> str:
    if axes is None:
        return "refused" if verdict in ORDERS else "right"
    return "right" if ORDERS.get(verdict) == axes else "wrong"


def put_page(page: Path, outcomes: Mapping[str, Outcome], failed: Mapping[str, str]) -> None:
    """Replace the part of ``page`` between the two marks."""
    tensors = sum((outcome.tensors for outcome in outcomes.values()), Counter[str]())
    types = Counter(outcome.verdict for outcome in outcomes.values())
    parts = len(failed.keys() & architectures().rows.keys())
    lines = [
        _START,
        "",
        "| | right | left out by name | told by the overlay | wrong |",
        "|---|---|---|---|---|",
        *(
            f"| {what} | "
            + " | ".join(f"{counts[said]:,}" for said in ("right", "refused", "by hand", "wrong"))
            + " |"
            for what, counts in (
                ("model types, by their worst tensor", types),
                ("tensors of two axes or more", tensors),
            )
        ),
        "",
        f"Of {len(outcomes)} model types, {sum(one.ffn for one in outcomes.values())} offer `ffn` and "
        f"{sum(one.units for one in outcomes.values())} offer `units`.",
        "",
        f"{len(failed)} model types have no model of their own that could be built. "
        f"The table has {parts} of them as parts of composites. The others:",
        "",
    ]
    reasons: dict[str, list[str]] = {}
    for name, why in failed.items():
        if name in architectures().rows:
            continue
        reasons.setdefault(why.partition("; ")[0].strip() or "unknown", []).append(f"`{name}`")
    for why, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"- {why.replace('|', ' ')} ({len(names)}): {', '.join(names)}")
    lines += [
        "",
        "Tensors that are left out although they are weights of layers, the first of each type:",
        "",
    ]
    for name, outcome in outcomes.items():
        if outcome.tensors["refused"]:
            lines.append(f"- `{name}` ({outcome.tensors['refused']}): {outcome.examples['refused']}")
    known = sorted(set(architectures().rows) - {SHARED})
    lines += [
        "",
        f"The table knows {len(known)} model types:",
        "",
        ", ".join(f"`{name}`" for name in known) + ".",
    ]
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(_START)
    page.write_text(before + "\n".join(lines) + "\n" + _END + rest.partition(_END)[2], encoding="utf-8")
