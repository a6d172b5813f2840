"""train: from a recipe to a patch. Importing this module loads neither torch nor transformers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..progress import Progress, silent
from ..storage.threads import Limits
from ..surgery.verb import warn

if TYPE_CHECKING:
    from .recipe_reader import AnyRecipe
    from .train_result import TrainResult

__all__ = ["require_training", "train"]

_log = logging.getLogger(__name__)


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

    Parameters
    ----------
    recipe:
        The path of a YAML file, or a mapping with the same content; ``recipes/quickstart.yaml`` explains the
        keys. Paths in a file start from its folder, paths in a mapping from the current folder.
    force:
        Replace an existing ``out``.
    resume:
        Require an unfinished run.
    restart:
        Discard an unfinished run.
    threads, memory:
        As in `neftsurgery.diff`, for scoring files.
    progress:
        Receives optimizer steps.
    **overrides:
        Values that replace the recipe's, by section: ``out="run"``, ``train={"steps": 100}``, or
        ``**{"train.steps": 100}`` as ``--set`` spells it.

    Raises
    ------
    UsageError
        For a wrong recipe, missing files, an existing ``out``, or packages that are not installed.
    MismatchError
        If files do not fit the model, no neuron is chosen, or the loss is not a number.
    CorruptFileError
        For an unreadable example; it names the line.
    MachineError
        If something cannot be read or written.
    """
    require_training()
    from .train_plan import plan_train

    limits = Limits.of(threads, memory)
    plan = plan_train(
        recipe, overrides, force=force, resume=resume, restart=restart, limits=limits, progress=progress
    )
    warn(_log, plan.warnings)
    return plan.run(limits=limits, progress=progress, note=_log.info)


def require_training() -> None:
    """Raise a `UsageError` unless the packages for training are installed."""
    try:
        from . import train_plan  # noqa: F401  # imports all of them
    except ImportError as error:
        raise UsageError(
            f"training needs a package that is not installed: {error.name}",
            hint="pip install 'neftsurgery[train]'",
        ) from error
