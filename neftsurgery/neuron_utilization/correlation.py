"""The Pearson correlation of neurons' vectors with hidden states: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..live.weights import read_vectors
from ..neurons.layout import Layout

__all__ = ["max_correlations"]

_BLOCK_ELEMENTS = 1 << 22  # of float64: 32 MiB


def max_correlations(
    weight: Tensor, layout: Layout, states: Tensor, *, block_elements: int = _BLOCK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """The largest absolute correlation of each neuron with any of the states, and the number of that state.

    The correlation of a vector ``w`` with a state ``h`` is taken over their elements, the hidden dimension:
    ``(w - mean w).(h - mean h) / (|w - mean w| |h - mean h|)``, in float64. If all elements of ``w`` or of
    ``h`` are equal, the correlation is undefined and counts as 0.

    ``weight`` is a live weight of ``layout``, ``states`` float64 ``[states, width]``, finite, on the CPU, at
    least one. At most ``block_elements`` elements of the weight are in float64 at once.

    Returns float64 ``[n]`` in [0, 1], NaN for vectors with a NaN or Inf, and int64 ``[n]``, the first such
    state.
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
