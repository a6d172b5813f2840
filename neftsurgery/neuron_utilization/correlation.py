"""Pearson correlation of neurons' vectors with hidden states, in blocks. Tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..live.weights import read_vectors
from ..neurons.layout import Layout

__all__ = ["strongest"]

_ELEMENTS = 1 << 22  # in float64 at once, at most: 32 MiB


def strongest(weight: Tensor, layout: Layout, states: Tensor) -> tuple[Tensor, Tensor]:
    """Per neuron its largest absolute correlation with any of the states, and with which one.

    The correlation of a vector ``w`` with a state ``h`` is taken across their elements, the hidden
    dimension: ``(w - mean w).(h - mean h) / (|w - mean w| |h - mean h|)``, in float64. Where all elements
    of one of them are equal it is not defined: it counts as 0, no alignment.

    Parameters
    ----------
    weight:
        A live weight of ``layout``.
    states:
        Float64 ``[states, width]``, finite, on the CPU, at least one.

    Returns
    -------
    tuple of Tensor
        Float64 ``[n]`` in [0, 1], NaN for vectors with a NaN or Inf; int64 ``[n]``, the first such state.
    """
    device = weight.device if weight.device.type == "cuda" else torch.device("cpu")  # others lack float64
    units = _units(states).to(device)
    values = torch.empty(layout.count, dtype=torch.float64)
    which = torch.empty(layout.count, dtype=torch.int64)
    step = max(1, _ELEMENTS // max(1, layout.width))
    for start in range(0, layout.count, step):
        index = torch.arange(start, min(start + step, layout.count), device=weight.device)
        vectors = read_vectors(weight.detach(), layout, index).to(device).double()
        found, at = (_units(vectors) @ units.T).abs().max(dim=1)
        found[~torch.isfinite(vectors).all(dim=1)] = torch.nan
        values[start : start + len(index)] = found.clamp_(max=1).cpu()
        which[start : start + len(index)] = at.cpu()
    return values, which


def _units(vectors: Tensor) -> Tensor:
    """Centred and of length 1; all zeros where every element is the same."""
    centred = vectors - vectors.mean(dim=1, keepdim=True)
    centred /= centred.abs().amax(dim=1, keepdim=True)  # no square of what is left under- or overflows
    centred /= torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    constant = vectors.amax(dim=1) == vectors.amin(dim=1)
    centred[constant] = 0
    return centred
