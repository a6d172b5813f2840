"""The correlation of vectors with hidden states, compared with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neftsurgery.neuron_utilization.measure import max_correlations
from neftsurgery.neurons.layout import Layout

NAN = float("nan")


def test_correlation_is_pearsons() -> None:
    rng = np.random.default_rng(0)
    weight, states = rng.standard_normal((3, 9, 5)), rng.standard_normal((4, 9))
    values, which = max_correlations(torch.tensor(weight), Layout.of((3, 9, 5), (0, 2)), torch.tensor(states))
    vectors = weight.transpose(0, 2, 1).reshape(15, 9)
    for vector, value, at in zip(vectors, values.tolist(), which.tolist(), strict=True):
        expected = [abs(np.corrcoef(vector, state)[0, 1]) for state in states]
        assert value == pytest.approx(max(expected), rel=1e-12)
        assert at == int(np.argmax(expected))


def test_degenerate_vectors() -> None:
    states = torch.tensor([[1.0, 2.0, 4.0], [0.1, 0.1, 0.1]], dtype=torch.float64)
    weight = torch.tensor(
        [[0.1, 0.1, 0.1], [0.0, 0.0, 0.0], [1.0, NAN, 2.0], [1.0, float("inf"), 2.0], [-2e30, -4e30, -8e30],
         [2e-30, 4e-30, 8e-30]]
    )  # fmt: skip
    values, _ = max_correlations(weight, Layout.of((6, 3), (0,)), states)
    assert values[:2].tolist() == [0, 0]  # all elements equal: no alignment, whatever rounding leaves
    assert values[2:4].isnan().all()
    assert values[4:].tolist() == pytest.approx([1, 1], rel=1e-6)
    nothing, _ = max_correlations(weight[4:], Layout.of((2, 3), (0,)), states[1:])
    assert nothing.tolist() == [0, 0]
