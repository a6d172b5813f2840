"""train: from a recipe to a patch. Importing this module loads neither torch nor transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..patch.patch_file import PATCH_NAME
from ..progress import Progress, silent
from ..selection.selection import Selection
from ..storage.threads import Limits
from ..surgery.verb import warn
from ..text import printable
from ..version import install_command
from .loss_curve import LossPoint

if TYPE_CHECKING:
    from .recipe_reader import AnyRecipe


_log = logging.getLogger(__name__)
RESULTS = ("train_loss", "base_dev_loss", "dev_loss", "control_dev_loss", "best_step")
_STATE = ("finished", "step", "resumed_from", "pushed")


def train(
    recipe: AnyRecipe,
    *,
    force: bool = False,
    resume: bool = False,
    restart: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress = silent,
    **overrides: Any,
) -> TrainResult:
    """Find the neurons that matter for a recipe's data, train them and nothing else, and cut the patch.

    An unfinished run of the same recipe resumes from its last save.

    Args:
        recipe: The path of a YAML file, or a mapping with the same content; ``recipes/quickstart.yaml``
            explains the keys. Paths in a file start from its folder, paths in a mapping from the current
            folder.
        force: Replace an existing ``out``.
        resume: Require an unfinished run.
        restart: Discard an unfinished run.
        threads, memory: As in `neftsurgery.diff`, for scoring files.
        progress: Receives optimizer steps.
        **overrides: Values that replace the recipe's, by section: ``out="run"``, ``train={"steps": 100}``, or
            ``**{"train.steps": 100}`` as ``--set`` spells it.

    Raises:
        UsageError: For a wrong recipe, missing files, an existing ``out``, or packages that are not
            installed.
        MismatchError: If files do not fit the model, no neuron is chosen, an example has other fields than
            expected, or the loss is not a number.
        CorruptFileError, MachineError: For a line of examples that is not JSON; if something cannot be read
            or written.
    """
    require_training()
    from .train_plan import plan_train

    limits = Limits.of(threads, memory)
    plan = plan_train(
        recipe, overrides, force=force, resume=resume, restart=restart, limits=limits, progress=progress
    )
    warn(__name__, plan.warnings)
    return plan.run(limits=limits, progress=progress, report=partial(_log.info, "%s: %s"), note=_log.info)


def require_training() -> None:
    """Raise a `UsageError` unless the packages for training are installed."""
    try:
        from . import train_plan  # noqa: F401  # imports all of them but one

        if find_spec("datasets") is None:
            raise ImportError(name="datasets")
    except ImportError as error:
        what = f"training needs a package that is not installed: {error.name or error}"
        raise UsageError(what, hint=install_command("train")) from error


@dataclass(frozen=True)
class TrainResult:
    """A run that has finished, or was stopped and saved."""

    # The folder with the patch, its selection and the loss curve, once the run has finished, and the run
    # directory, from which it resumes until then.
    out: Path
    run_directory: Path
    # The last step that was made, and the steps of the whole run; the step of the save that it resumed from.
    step: int
    steps: int
    resumed_from: int
    finished: bool  # all steps were made, or early stopping saw no use in more; else it was asked to stop
    selection: Selection = field(repr=False)  # the trained neurons; none if it was stopped in the probe
    curve: tuple[LossPoint, ...] = field(repr=False)
    # The last training loss; with dev examples, the dev loss and the step of the best patch, which is kept.
    train_loss: float | None = None
    dev_loss: float | None = None
    best_step: int | None = None
    dev_losses: Mapping[str, float] = field(default_factory=dict)  # of each set at the best step, if several
    plotted: bool = False  # whether the loss curve was plotted
    patch_bytes: int = 0  # the size of the patch file
    pushed: str | None = None  # the address of the patch on the Hub, if the recipe has ``push``

    @property
    def base_dev_loss(self) -> float | None:
        """The dev loss before the first step."""
        return next((point.dev_loss for point in self.curve if point.step == 0), None)

    @property
    def control_dev_loss(self) -> float | None:
        """The lowest dev loss of as many random neurons, if the recipe has a ``control``."""
        losses = (one.control_loss for one in self.curve if one.step and one.control_loss is not None)
        return min(losses, default=None)

    @property
    def patch(self) -> Path | None:
        """The patch file; None if the run has not finished."""
        return self.out / PATCH_NAME if self.finished else None

    def __str__(self) -> str:
        losses = (("train loss", self.train_loss), ("dev loss", self.dev_loss))
        measured = [f"{name} {loss:.4f}" for name, loss in losses if loss is not None]
        if self.best_step is not None:
            measured[-1] += f" at step {self.best_step}"
        where = (
            f"{self.patch}: {self.step} steps"
            if self.finished
            else f"stopped at step {self.step} of {self.steps}, saved in {self.run_directory}"
        )
        return printable(", ".join([where, f"{self.selection.neurons:,} neurons", *measured]))

    def describe(self) -> dict[str, object]:
        """For JSON; together with `TrainPlan.describe` it is what ``--json`` prints."""
        return {name: getattr(self, name) for name in (*RESULTS, *_STATE)} | {
            "estimated": False,
            "selected": self.selection.neurons,
            "trainable_parameters": self.selection.parameters,
            "dev_losses": dict(self.dev_losses),
            "out": str(self.out) if self.finished else None,
            "bytes": self.patch_bytes,
        }
