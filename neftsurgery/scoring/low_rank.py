"""The score ``lowrank``: the norm of a neuron's vector in the best low-rank approximation of its matrix.

LIFT (Liu et al., "LIFT the Veil for the Truth", ICML 2025) trains the elements that are largest in it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..neurons.layout import Layout
from ..neurons.vectors import blocks, gather
from ..tensors.arrays import Float64Array
from ..tensors.floats import widen
from ..tensors.header import TensorInfo
from ..tensors.reader import RowReader


def low_rank_energies(weights: RowReader, info: TensorInfo, layout: Layout, rank: int) -> Float64Array:
    """The squared norm of each neuron's vector in the approximation of rank ``rank``, ``[n]``.

    The neurons along the last neuron axis are the rows of one matrix: each expert has its own. Vectors whose
    squares are not finite count as zeros and get NaN.
    """
    count = layout.shape[layout.axes[-1]]
    energies = np.empty(layout.count)

    def parts(first: int) -> Iterator[tuple[slice, Float64Array]]:
        """The vectors of the matrix whose first neuron this is, some at a time."""
        for start, stop in blocks(info, layout, count):
            here = slice(first + start, first + stop)
            rows = widen(gather(weights, info, layout, np.arange(here.start, here.stop)), info.dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                energies[here] = np.where(np.isfinite(np.square(rows).sum(1)), 0.0, np.nan)
            rows[np.isnan(energies[here])] = 0.0
            yield here, rows

    for first in range(0, layout.count, count):
        if layout.width <= count:  # by the smaller of the two products of the matrix with itself
            product = sum(rows.T @ rows for _, rows in parts(first))
            directions = np.linalg.eigh(product).eigenvectors[:, -rank:]
            for here, rows in parts(first):
                energies[here] += np.square(rows @ directions).sum(1)
        else:
            matrix = np.concatenate([rows for _, rows in parts(first)])
            values, directions = np.linalg.eigh(matrix @ matrix.T)
            squares = np.square(directions[:, -rank:])
            energies[first : first + count] += squares @ np.maximum(values[-rank:], 0.0)
    return energies
