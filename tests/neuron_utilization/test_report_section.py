"""The section of a report that shows a utilization. The page is opened by reporting/test_html_page.py."""

from __future__ import annotations

import numpy as np

from neftsurgery.neuron_utilization.report_section import utilization_section
from neftsurgery.neuron_utilization.result import GROUPS, TensorUtilization, Utilization, with_ranks
from neftsurgery.neurons.layout import Layout
from neftsurgery.tensors.header import TensorInfo


def test_a_section_has_three_figures_with_the_numbers_of_the_groups() -> None:
    rng, zeros = np.random.default_rng(0), np.zeros(9, np.int32)
    tensors = [
        TensorUtilization(
            TensorInfo(f"layers.{layer}.up.weight", "F32", (9, 4)), Layout.of((9, 4), (0,)),
            f"layers.{layer}", "up", rng.random(9), rng.random(9), zeros, zeros, zeros.astype(np.int64),
            zeros.astype(np.int64), rng.random(9) < 0.3,
        )
        for layer in range(2)
    ]  # fmt: skip
    facts = {"states": "all", "patch": {"outside": 5}, "text": {"name": "a.txt", "texts": 2, "tokens": 7}}
    found = Utilization(with_ranks(tensors), facts)
    section = utilization_section(found, "Use", suffix="-1")
    assert section.id == "utilization-1"
    assert [figure.id for figure in section.figures] == ["use-groups-1", "use-buckets-1", "use-map-1"]
    assert ("trained, not ranked", "5") in section.facts
    groups, _, by_layer = section.figures
    assert [row[2] for row in groups.table.rows] == [found.groups()[name].neurons for name in GROUPS]
    assert sum(int(str(row[2])) for row in by_layer.table.rows) == found.neurons == 18
    assert all(figure.png().startswith(b"\x89PNG") for figure in section.figures)
