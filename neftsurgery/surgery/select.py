"""select: choose neurons from scores, within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MismatchError
from ..scoring.scores import Scores
from ..selection.budget import Budget
from ..selection.selection import Selection
from ..storage.output_checks import AnyPath, refuse_output


@dataclass(frozen=True)
class SelectPlan:
    """The neurons are chosen, nothing is written. Made by `plan_select`."""

    scores: Scores
    selection: Selection
    out: Path
    force: bool = False
    warnings: Sequence[str] = ()

    def describe(self) -> dict[str, object]:
        """For ``--dry-run`` and JSON."""
        return {
            "neurons": self.scores.neurons,
            **self.selection.describe(),
            "parameters": self.scores.parameters,
            "captured": self.selection.facts.captured,
            "captured_scored": self.selection.facts.captured_scored,
            "out": str(self.out),
            "warnings": list(self.warnings),
        }

    def run(self) -> Selection:
        """Write the selection file."""
        self.selection.save(self.out, force=self.force)
        return self.selection


def plan_select(
    scores: Scores,
    budget: Mapping[str, Any],
    *,
    out: AnyPath,
    inputs: Sequence[AnyPath] = (),
    force: bool = False,
) -> SelectPlan:
    """Choose neurons by scores; ``budget`` as the keywords of `Scores.select`. To choose none is an error."""
    here = [scores.path] if scores.path is not None else []
    refuse_output(out, inputs=[*here, *inputs], force=force, kind="file")
    checked = Budget.of(**budget)
    selection = scores.choose(checked)
    if not selection.tensors:
        raise MismatchError("no neuron is chosen", file=scores.path, hint="the threshold may be too high")
    warnings = checked.warnings(scores.units or scores.neurons)
    return SelectPlan(scores, selection, Path(out), force, warnings)
