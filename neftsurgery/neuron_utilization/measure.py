"""utilization: rank every neuron by its correlation with hidden states, before and after a fine-tune."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, boundary
from ..live.names import live_names
from ..patch.patch import Patch
from ..progress import Progress, silent
from ..surgery.diff import diff
from ..tuning.attach import attach
from ..version import __version__
from .correlation import strongest
from .models import live_model, stack_of
from .plan import BATCH, TOKENS, States, UtilizationPlan, plan_utilization
from .result import NeuronUse, Utilization, ranked
from .states import mean_states
from .text import batches

__all__ = ["measure", "utilization"]

_Side = dict[str, tuple[NDArray[np.float64], NDArray[np.int32]]]


@boundary
def utilization(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str] | Patch,
    text: str | os.PathLike[str],
    *,
    anatomy: str | None = None,
    states: States = "preceding",
    strongly: str | int | None = None,
    tokens: int = TOKENS,
    length: int | None = None,
    batch: int = BATCH,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress = silent,
) -> Utilization:
    """Tell how a fine-tune moved neurons in the ranking by correlation with hidden states.

    Per neuron, the Pearson correlation of its weight vector with the mean hidden state of each layer on
    a text; its largest absolute value ranks the neuron among those of its kind; and the difference of
    the ranks before and after tells what training did to it. Xu et al., "Let's Focus on Neuron", COLING 2025,
    section 6.1 (https://aclanthology.org/2025.coling-main.630/). ``docs/utilization.md`` has the
    definitions, and what was read into the paper where it is silent.

    Parameters
    ----------
    base:
        The checkpoint before training: a folder or Hub id, with config and tokenizer.
    tuned:
        A patch of it, which is put into the live model, so that no second copy is needed; its neurons are the
        trained ones. Or another checkpoint: then those with any differing bit are.
    text:
        A UTF-8 file with a text on each line.
    anatomy:
        ``ffn`` (the paper's up rows and down columns) or ``rows``. None: ``ffn``, and beside it the kinds of
        weights that the patch has neurons of. Only vectors as wide as the hidden states are looked at.
    states:
        Hidden states that enter the neuron's block or an earlier one (``preceding``, the paper's words),
        those that leave its block or a later one (``following``, the code published with it), or ``all``.
    strongly:
        Neurons that move by more ranks than this are strongly affected: a number, or a share of the
        neurons ranked together (``"5%"``). None: the paper's 100,000, as a share: 28.4%.
    tokens:
        So many of the text, at most.
    length:
        Tokens of a text that the model sees together, at most; by default 512, or what the model can.
    batch:
        Tokens of several texts that go through it at once.
    dtype, device:
        What the model computes in (``auto``: the type of its files) and on (``auto``: a GPU if there is one).
        Correlations are always computed in float64.
    progress:
        Told of tokens, then of neurons, for each of the two models.

    Raises
    ------
    UsageError
        For a path or option that makes no sense, an empty text, or a model without a usable tokenizer.
    MismatchError
        If the patch is not of this base, or the model has no hidden states of one width.
    CorruptFileError
        If a file is damaged, or the text is not UTF-8.
    MachineError
        If something cannot be read.
    """
    plan = plan_utilization(
        base, tuned, text, anatomy=anatomy, states=states, strongly=strongly, tokens=tokens, length=length,
        batch=batch, dtype=dtype, device=device,
    )  # fmt: skip
    return measure(plan, progress=progress)


@boundary
def measure(plan: UtilizationPlan, *, progress: Progress = silent) -> Utilization:
    """Carry out a planned analysis."""
    if isinstance(plan.tuned, Patch):
        trained = _of_patch(plan, plan.tuned)
    else:
        trained = _of_comparison(plan, plan.tuned, progress)
    model = live_model(plan.base, plan.stack, dtype=plan.dtype, device=plan.device)
    before = _side(plan, model, "before", progress)
    if isinstance(plan.tuned, Patch):
        with attach(model, plan.tuned, base=plan.base.source.path):
            after = _side(plan, model, "after", progress)
    else:
        del model  # two at once may not fit
        other = live_model(plan.tuned, plan.stack, dtype=plan.dtype, device=plan.device)
        after = _side(plan, other, "after", progress)
    unranked = np.zeros(0, np.int64)
    found = [
        NeuronUse(
            tensor.info, tensor.layout, tensor.layer, tensor.kind, before[name][0], after[name][0],
            before[name][1], after[name][1], unranked, unranked, trained[name],
        )
        for name, tensor in plan.tensors.items()
    ]  # fmt: skip
    return Utilization(ranked(found), plan.describe() | {"created_by": f"neftsurgery {__version__}"})


def _side(plan: UtilizationPlan, model: Any, which: str, progress: Progress) -> _Side:
    """Per tensor, of each neuron the largest correlation and the number of its hidden state."""
    names = live_names(model, plan.tensors)
    stack = stack_of(model, names.values())
    with progress(f"hidden states {which}", plan.text.tokens) as advance:
        pieces = batches(plan.text, plan.batch)
        means = mean_states(model, stack, pieces, padding=plan.padding, advance=advance)
    with progress(f"correlations {which}", plan.neurons) as advance:
        return {
            name: _of_tensor(plan, name, model.get_parameter(names[name]), means, advance)
            for name in plan.tensors
        }


def _of_tensor(
    plan: UtilizationPlan,
    name: str,
    weight: torch.Tensor,
    means: torch.Tensor,
    advance: Callable[[int], None],
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    tensor, own = plan.tensors[name], plan.blocks[name] + 1
    start, stop = {"preceding": (0, own), "following": (own, len(means)), "all": (0, len(means))}[plan.states]
    if tuple(weight.shape) != tensor.info.shape or means.shape[1] != tensor.layout.width:
        raise MismatchError(
            "the live weight, or the hidden states, have another width",
            tensor=name,
            expected=f"{list(tensor.info.shape)} and {tensor.layout.width}",
            found=f"{list(weight.shape)} and {means.shape[1]}",
        )
    values, at = strongest(weight, tensor.layout, means[start:stop])
    if tensor.part is not None:
        values[torch.from_numpy(~tensor.part.mask())] = torch.nan
    advance(tensor.layout.count if tensor.part is None else tensor.part.count)
    return values.numpy(), (at + start).numpy().astype(np.int32)


def _of_patch(plan: UtilizationPlan, patch: Patch) -> dict[str, NDArray[np.bool_]]:
    """Which neurons the patch replaces."""
    found = {name: np.zeros(tensor.layout.count, np.bool_) for name, tensor in plan.tensors.items()}
    for name, tensor in patch.tensors.items():
        if name in found and tensor.layout.axes == plan.tensors[name].axes:
            found[name][patch.index(name)] = True
    return found


def _of_comparison(
    plan: UtilizationPlan, tuned: Checkpoint, progress: Progress
) -> dict[str, NDArray[np.bool_]]:
    """Which neurons have any differing bit."""
    names = list(plan.tensors)
    axis = [(name, tensor.axes) for name, tensor in plan.tensors.items()]
    with diff(
        plan.base.source.path, tuned.source.path,
        score="changed", include=names, only=names, axis=axis, progress=progress,
    ) as scores:  # fmt: skip
        found = {}
        for name in names:
            changed = scores.sums(name, "changed") if name in scores.tensors else None
            if changed is None:
                raise MismatchError(
                    "the two checkpoints do not both have this weight, of one shape and type",
                    file=tuned.name,
                    tensor=name,
                )
            found[name] = changed > 0
    return found
