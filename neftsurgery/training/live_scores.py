"""Scores files from scores that were computed on a live model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance
from ..neurons.anatomy import Anatomy
from ..scoring.scores import SCORES_KEY, SCORES_VERSION, Scores
from ..surgery.diff import describe_tensor
from ..tensors.document import dump
from ..tensors.header import TensorInfo
from ..tensors.writer import written_file

__all__ = ["write_scores"]


def write_scores(
    score: str,
    values: Mapping[str, NDArray[np.float64]],
    base: Checkpoint,
    anatomy: Anatomy,
    units: Mapping[str, NDArray[np.int64]],
    out: str | os.PathLike[str] | None = None,
) -> Scores:
    """Write the scores of the neurons of ``anatomy`` in the format of `neftsurgery.diff`.

    Parameters
    ----------
    score:
        The name of the score.
    values:
        The neurons' scores, ``[n]``, per tensor of ``anatomy.scored``. A neuron with NaN is never chosen.
    units:
        The neurons' units, ``[n]``, per tensor, if the anatomy has units. The neurons of a unit have
        the same score.
    out:
        The scores file. None: a temporary file.
    """
    biases = {t.bias for t in anatomy.scored if t.bias is not None}
    companions = [entry.info for entry in anatomy.listed if entry.info.name in biases]
    facts = {
        "version": SCORES_VERSION,
        "score": score,
        "anatomy": anatomy.name,
        "parameters": base.parameters,
        "base": Provenance.of(base).to_json(),
        "nonfinite": 0,
        "tensors": {tensor.info.name: describe_tensor(tensor) for tensor in anatomy.scored},
        "unscored": {info.name: _describe_bias(info) for info in companions},
    }
    entries = [TensorInfo(name, "F32", value.shape) for name, value in values.items()]
    entries += [TensorInfo(f"{name}:unit", "I64", ids.shape) for name, ids in units.items()]
    entries += [TensorInfo(f"{info.name}:changed", "I64", (info.elements,)) for info in companions]
    metadata = dump(SCORES_KEY, facts)
    with written_file(entries, metadata, out) as written:
        for name, value in values.items():
            written.writer.write(name, 0, value.astype(np.float32))
        for name, ids in units.items():
            written.writer.write(f"{name}:unit", 0, ids)
        for info in companions:  # nothing has changed yet; being listed lets a bias go with its neurons
            written.writer.write(f"{info.name}:changed", 0, np.zeros(info.elements, np.int64))
        written.writer.finish(metadata)
    return Scores.read(written.reader())


def _describe_bias(info: TensorInfo) -> dict[str, Any]:
    axes = list(range(len(info.shape)))
    return {"reason": "bias", "shape": list(info.shape), "dtype": info.dtype, "neuron_axes": axes}
