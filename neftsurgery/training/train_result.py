"""The result of a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..selection.selection import Selection
from .loss_curve import LossPoint

__all__ = ["TrainResult"]


@dataclass(frozen=True)
class TrainResult:
    """A run that has finished, or was stopped and saved.

    Attributes
    ----------
    out:
        The folder with the patch, its selection and the loss curve; it exists if the run has finished.
    run_directory:
        The folder from which an unfinished run resumes; it exists only if the run has not finished.
    step, steps:
        The last step that was made, and the number of steps of the whole run.
    resumed_from:
        The step of the save that the run resumed from. 0: it started from the base.
    selection:
        The trained neurons.
    curve:
        The loss curve.
    train_loss:
        The last measured training loss.
    dev_loss, best_step:
        The dev loss and the step of the best patch, which is the one that is kept. None without dev examples.
    plotted:
        Whether the loss curve was plotted.
    patch_bytes:
        The size of the patch file.
    """

    out: Path
    run_directory: Path
    step: int
    steps: int
    resumed_from: int
    selection: Selection = field(repr=False)
    curve: tuple[LossPoint, ...] = field(repr=False)
    train_loss: float | None = None
    dev_loss: float | None = None
    best_step: int | None = None
    plotted: bool = False
    patch_bytes: int = 0

    @property
    def finished(self) -> bool:
        """Whether all steps were made. If not, the run was asked to stop, and has saved."""
        return self.step >= self.steps

    @property
    def patch(self) -> Path | None:
        """The patch file; None if the run has not finished."""
        return self.out / "neuron_patch.safetensors" if self.finished else None

    def __str__(self) -> str:
        losses = (("train loss", self.train_loss), ("dev loss", self.dev_loss))
        measured = [f"{name} {loss:.4f}" for name, loss in losses if loss is not None]
        if self.best_step is not None:
            measured[-1] += f" at step {self.best_step}"
        where = (
            f"{self.patch}: {self.steps} steps"
            if self.finished
            else f"stopped at step {self.step} of {self.steps}, saved in {self.run_directory}"
        )
        return ", ".join([where, f"{self.selection.neurons:,} neurons", *measured])

    def describe(self) -> dict[str, Any]:
        """For JSON; together with `TrainPlan.describe` it is what ``--json`` prints."""
        return {
            "estimated": False,
            "selected": self.selection.neurons,
            "trainable_parameters": self.selection.parameters,
            "finished": self.finished,
            "step": self.step,
            "resumed_from": self.resumed_from,
            "train_loss": self.train_loss,
            "dev_loss": self.dev_loss,
            "best_step": self.best_step,
            "out": str(self.out) if self.finished else None,
            "bytes": self.patch_bytes,
        }
