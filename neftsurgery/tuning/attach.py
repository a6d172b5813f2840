"""attach: make chosen neurons of a live model trainable and freeze the rest, or put a patch's values in."""

from __future__ import annotations

import os

from torch import nn

from ..errors import UsageError, boundary
from ..patch.patch import Patch
from ..selection.selection import Selection
from .attached import Attached
from .base_checkpoint import BaseOption, find_base
from .weight_plans import ModeOption

__all__ = ["attach"]


@boundary
def attach(
    model: nn.Module,
    what: Selection | Patch | str | os.PathLike[str],
    *,
    base: BaseOption = None,
    mode: ModeOption = "auto",
    trainable: bool | None = None,
) -> Attached:
    """Make the chosen neurons of a live model trainable and freeze the rest; or put a patch's values in.

    Parameters
    ----------
    model:
        A torch model, before it is wrapped (DDP, FSDP) or compiled. Its modules, names and state dict stay.
    what:
        A selection: its neurons become trainable, starting from the values that the model holds. A patch, its
        file or its Hub id (``org/name``, ``org/name@revision``): the neurons take its values, and are
        trained only if ``trainable``.
    base:
        The checkpoint that the model was loaded from: a file, a folder, or a Hub id. It gives the
        patch its dtypes and hashes. None: the checkpoint that the model names, if that is on this
        machine, else the live weights. False: the live weights.
    mode:
        ``scatter``: the values are written into the weight; costs hardly more than a frozen model.
        ``overlay``: the weight is never written; for quantized, sharded and shared weights.
        ``auto``: scatter where possible.
    trainable:
        None: a selection is, a patch is not.

    Raises
    ------
    MismatchError
        If the selection or patch does not fit the model or its base, or the model's dtype cannot hold
        the checkpoint's values exactly. Nothing is changed.
    UsageError
        If a layer's type, or neurons that are already attached, do not allow it. Nothing is changed.
    """
    _refuse_wrapped(model)
    if isinstance(what, (str, os.PathLike)):
        what = Patch.load(what)
    train = isinstance(what, Selection) if trainable is None else trainable
    if isinstance(what, Selection) and not train:
        raise UsageError("a selection has no values", hint="attach a patch, or train the selection")
    attached = Attached(model, what, find_base(model, base), mode, train)
    attached._attach(what)
    return attached


def _refuse_wrapped(model: nn.Module) -> None:
    inner = next((name for name in ("_orig_mod", "module") if name in model._modules), None)
    if inner == "_orig_mod" or isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise UsageError(
            f"the model is wrapped in {type(model).__name__}",
            hint=f"attach to the model itself (model.{inner}), before it is wrapped",
        )
