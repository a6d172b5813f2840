"""The Pearson correlations of neurons' vectors with hidden states, before and after a fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError
from ..live.loading import load_model
from ..live.loading_rules import live_weights
from ..live.placement import FileTensors, live_places
from ..live.weights import read_vectors
from ..neurons.layout import Layout
from ..patch.patch import Patch
from ..progress import Progress
from ..surgery.diff import diff
from ..tuning.attached import attach
from .hidden_states import find_block_stack, mean_hidden_states
from .options import DTYPES
from .result import TensorUtilization, with_ranks
from .tokenized_text import token_batches

if TYPE_CHECKING:
    from .utilization import UtilizationPlan


_Correlations = dict[str, tuple[NDArray[np.float64], NDArray[np.int32]]]
_BLOCK_ELEMENTS = 1 << 22  # of float64: 32 MiB


def measure(plan: UtilizationPlan, progress: Progress) -> dict[str, TensorUtilization]:
    """The ranked neurons of each tensor of a plan, by name."""
    if isinstance(plan.tuned, Patch):
        trained = _replaced(plan, plan.tuned)
    else:
        trained = _changed(plan, plan.tuned, progress)
    model = _load(plan, plan.base)
    before = _correlations(plan, model, "before", progress)
    if isinstance(plan.tuned, Patch):
        with attach(model, plan.tuned, base=plan.base.source.path):
            after = _correlations(plan, model, "after", progress)
    else:
        del model  # memory may not hold two models
        after = _correlations(plan, _load(plan, plan.tuned), "after", progress)
    no_ranks, found = np.zeros(0, np.int64), []
    for name, tensor in plan.tensors.items():
        (first, state), (second, state_after) = before[name], after[name]
        numbers = (first, second, state, state_after, no_ranks, no_ranks, trained[name])
        found.append(TensorUtilization(tensor.info, tensor.layout, tensor.layer, tensor.kind, *numbers))
    return with_ranks(found)


def _load(plan: UtilizationPlan, checkpoint: Checkpoint) -> Any:
    """A model with its weights. The files must hold every block, on which the hidden states depend."""
    dtype: Any = getattr(torch, plan.dtype) if plan.dtype in DTYPES else "auto"
    model = load_model(checkpoint, "saved", dtype=dtype, required=plan.stack)
    model.config.use_cache = False  # every text is read once
    return model.to(plan.device)


def _correlations(plan: UtilizationPlan, model: Any, when: str, progress: Progress) -> _Correlations:
    """By tensor, the largest correlation of each neuron, and the number of its hidden state."""
    places = live_places(model, {name: tensor.layout for name, tensor in plan.tensors.items()})
    weights = FileTensors(live_weights(model), places)
    stack = find_block_stack(model, [found[0].parameter for found in places.values()])
    with progress(f"hidden states {when}", plan.text.tokens) as advance:
        batches = token_batches(plan.text, plan.batch)
        means = mean_hidden_states(model, stack, batches, padding=plan.padding, advance=advance)
    with progress(f"correlations {when}", plan.neurons) as advance:
        return {name: _of_tensor(plan, name, weights[name], means, advance) for name in plan.tensors}


def _of_tensor(
    plan: UtilizationPlan, name: str, weight: Tensor, means: Tensor, advance: Callable[[int], None]
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    tensor, own = plan.tensors[name], plan.blocks[name] + 1
    start, stop = {"preceding": (0, own), "following": (own, len(means)), "all": (0, len(means))}[plan.states]
    if tuple(weight.shape) != tensor.info.shape or means.shape[1] != tensor.layout.width:
        raise MismatchError(
            "the live weight or the hidden states have a shape other than the checkpoint's",
            tensor=name,
            expected=f"{list(tensor.info.shape)}, hidden states of {tensor.layout.width}",
            found=f"{list(weight.shape)}, hidden states of {means.shape[1]}",
        )
    values, states = max_correlations(weight, tensor.layout, means[start:stop])
    values[torch.from_numpy(~tensor.counted())] = torch.nan
    advance(tensor.neurons)
    return values.numpy(), (states + start).numpy().astype(np.int32)


def _replaced(plan: UtilizationPlan, patch: Patch) -> dict[str, NDArray[np.bool_]]:
    """Which neurons the patch replaces, by tensor."""
    found = {name: np.zeros(tensor.layout.count, np.bool_) for name, tensor in plan.tensors.items()}
    for name, tensor in patch.tensors.items():
        if name in found and tensor.layout.axes == plan.tensors[name].axes:
            found[name][patch.index(name)] = True
    return found


def _changed(plan: UtilizationPlan, tuned: Checkpoint, progress: Progress) -> dict[str, NDArray[np.bool_]]:
    """Which neurons have a bit that differs between the two checkpoints, by tensor."""
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
                    "the two checkpoints do not both have this weight with the same shape and dtype",
                    file=tuned.name,
                    tensor=name,
                )
            found[name] = changed > 0
    return found


def max_correlations(
    weight: Tensor, layout: Layout, states: Tensor, *, block_elements: int = _BLOCK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """The largest absolute correlation of each neuron of ``weight`` with any state, and the state's number.

    Pearson's in float64, ``[n]``: 0 if all elements of a vector or state are equal, NaN for a vector with a
    NaN or Inf. ``states`` are finite float64 ``[states, width]`` on the CPU.
    """
    device = weight.device if weight.device.type == "cuda" else torch.device("cpu")  # others lack float64
    directions = _directions(states).to(device)
    values = torch.empty(layout.count, dtype=torch.float64)
    which = torch.empty(layout.count, dtype=torch.int64)
    step = max(1, block_elements // max(1, layout.width))
    for start in range(0, layout.count, step):
        index = torch.arange(start, min(start + step, layout.count), device=weight.device)
        vectors = read_vectors(weight.detach(), layout, index).to(device).double()
        found, at = (_directions(vectors) @ directions.T).abs().max(dim=1)
        found[~torch.isfinite(vectors).all(dim=1)] = torch.nan
        values[start : start + len(index)] = found.clamp_(max=1).cpu()
        which[start : start + len(index)] = at.cpu()
    return values, which


def _directions(vectors: Tensor) -> Tensor:
    """The vectors centred and scaled to length 1; zeros for a vector whose elements are all equal."""
    centred = vectors - vectors.mean(dim=1, keepdim=True)
    centred /= centred.abs().amax(dim=1, keepdim=True)  # so that no square under- or overflows
    centred /= torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    constant = vectors.amax(dim=1) == vectors.amin(dim=1)
    centred[constant] = 0
    return centred
