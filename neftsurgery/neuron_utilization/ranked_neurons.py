"""Which neurons are ranked: those in a block whose vectors are as wide as the hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, UsageError
from ..neurons.anatomy import NeuronTensor, read_anatomy
from ..neurons.tensor_names import layer_and_kind
from ..selection.selection import Selection
from .options import ANATOMIES

__all__ = ["count_unranked", "ranked_tensors"]


def ranked_tensors(
    base: Checkpoint, trained: Selection | None, anatomy: str | None, width: int
) -> dict[str, NeuronTensor]:
    """The tensors by name whose neurons are as wide as the hidden states (``width``) and ranked.

    Without ``anatomy``: the paper's ``ffn``, and all tensors of the kinds in which ``trained`` has neurons.
    """
    if anatomy is not None and anatomy not in ANATOMIES:
        raise UsageError(
            "only single vectors can be correlated with hidden states",
            expected=f"the anatomy {' or '.join(ANATOMIES)}",
            found=anatomy,
        )
    trained_axes = {} if trained is None or anatomy is not None else _axes_by_kind(trained, width)
    found: dict[str, NeuronTensor] = {}
    try:
        scored = read_anatomy(anatomy or "ffn", base.tensors, base.config).scored
        found = {tensor.info.name: tensor for tensor in scored}
    except MismatchError:
        if not trained_axes:
            raise
    if trained_axes:
        for tensor in read_anatomy("rows", base.tensors, base.config).scored:
            axes = trained_axes.get(tensor.kind)
            known = found.get(tensor.info.name)
            if axes is not None and (known is None or known.axes != axes):
                found[tensor.info.name] = replace(tensor, axes=axes)
    wide = {name: t for name, t in found.items() if t.layout.width == width and t.layer}
    if not wide:
        raise MismatchError(
            f"no neuron of a block is as wide as the hidden states: {width} elements",
            file=base.name,
            hint="the anatomy rows has every row of a linear weight",
        )
    return dict(sorted(wide.items()))


def _axes_by_kind(trained: Selection, width: int) -> dict[str, tuple[int, ...]]:
    """The neuron axes of every kind of tensor that has trained neurons of this width."""
    companions = trained.facts.companion_biases
    return {
        layer_and_kind(name.split("."))[1]: chosen.layout.axes
        for name, chosen in trained.tensors.items()
        if name not in companions and chosen.layout.width == width
    }


def count_unranked(trained: Selection, tensors: Mapping[str, NeuronTensor]) -> int:
    """How many trained neurons are not among those of ``tensors``. Bias elements are not counted."""
    companions = trained.facts.companion_biases
    count = 0
    for name, chosen in trained.tensors.items():
        tensor = tensors.get(name)
        if name in companions:
            continue
        if tensor is None or tensor.axes != chosen.layout.axes:
            count += len(chosen.index)
        elif tensor.part is not None:
            count += int((~tensor.part.mask()[chosen.index]).sum())
    return count
