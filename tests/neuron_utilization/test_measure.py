"""The measurement does not depend on how the work is divided."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

import neftsurgery as ns
from neftsurgery.neuron_utilization import measure
from neftsurgery.neuron_utilization.measure import max_correlations


def test_correlations_do_not_depend_on_the_block_size(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ns.utilization(tiny / "base", tiny / "patch.safetensors", tiny / "text.txt")
    few = partial(max_correlations, block_elements=24 * 7)  # seven of the forty neurons at a time
    monkeypatch.setattr(measure, "max_correlations", few)
    parts = ns.utilization(tiny / "base", tiny / "patch.safetensors", tiny / "text.txt", batch=1)
    for name, tensor in whole.tensors.items():
        np.testing.assert_allclose(parts.tensors[name].after, tensor.after, rtol=1e-12)
        np.testing.assert_array_equal(parts.tensors[name].rank_after, tensor.rank_after)
