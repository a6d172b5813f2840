"""Which neurons are looked at: those whose vectors are as wide as the hidden states, and lie in a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, UsageError
from ..neurons.anatomy import NeuronTensor, read_anatomy
from ..neurons.tensor_names import layer_and_kind
from ..selection.selection import Selection, companion_biases

__all__ = ["looked_at", "outside"]


def looked_at(
    base: Checkpoint, chosen: Selection | None, anatomy: str | None, width: int
) -> dict[str, NeuronTensor]:
    """The tensors with neurons of ``width`` elements, by name.

    Parameters
    ----------
    chosen:
        The neurons that were trained, if that is known.
    anatomy:
        ``ffn`` or ``rows``. None: the paper's, ``ffn``, and beside it all tensors of the kinds that
        ``chosen`` has neurons of, along the same axes.

    Raises
    ------
    UsageError
        For another anatomy.
    MismatchError
        If the architecture is not known, or has no neuron of that width.
    """
    if anatomy not in (None, "ffn", "rows"):
        raise UsageError(
            "only single vectors correlate with hidden states", expected="ffn or rows", found=anatomy
        )
    alike = {} if chosen is None or anatomy is not None else _kinds(chosen, width)
    found: dict[str, NeuronTensor] = {}
    try:
        first = read_anatomy(anatomy or "ffn", base.tensors, base.config).scored
        found = {tensor.info.name: tensor for tensor in first}
    except MismatchError:
        if not alike:
            raise
    if alike:
        for tensor in read_anatomy("rows", base.tensors, base.config).scored:
            axes = alike.get(tensor.kind)
            known = found.get(tensor.info.name)
            if axes is not None and (known is None or known.axes != axes):
                found[tensor.info.name] = replace(tensor, axes=axes)
    wide = {name: t for name, t in found.items() if t.layout.width == width and t.layer}
    if not wide:
        raise MismatchError(
            f"no neuron of a block is as wide as the hidden states, {width} elements",
            file=base.name,
            hint="anatomy rows looks at every row of a linear weight",
        )
    return dict(sorted(wide.items()))


def _kinds(chosen: Selection, width: int) -> dict[str, tuple[int, ...]]:
    """The neuron axes of every kind of tensor that has chosen neurons of this width."""
    followers = companion_biases(chosen.facts)
    return {
        layer_and_kind(name.split("."))[1]: one.layout.axes
        for name, one in chosen.tensors.items()
        if name not in followers and one.layout.width == width
    }


def outside(chosen: Selection, tensors: Mapping[str, NeuronTensor]) -> int:
    """How many chosen neurons are not among those of ``tensors``; bias elements are not counted."""
    followers = companion_biases(chosen.facts)
    count = 0
    for name, one in chosen.tensors.items():
        tensor = tensors.get(name)
        if name in followers:
            continue
        if tensor is None or tensor.axes != one.layout.axes:
            count += len(one.index)
        elif tensor.part is not None:
            count += int((~tensor.part.mask()[one.index]).sum())
    return count
