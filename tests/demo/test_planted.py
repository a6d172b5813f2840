"""The synthetic fine-tune: the planted neurons, and they alone, change much."""

from __future__ import annotations

from pathlib import Path

import neftsurgery as ns
from neftsurgery.demo.planted import PLANTED, make_base, make_tuned, planted


def test_diff_finds_exactly_the_planted_neurons(tmp_path: Path) -> None:
    make_tuned(tmp_path / "tuned", make_base(tmp_path / "base"))
    with ns.diff(tmp_path / "base", tmp_path / "tuned") as scores:
        selection = scores.select(neurons=PLANTED)
    found = {name: chosen.index.tolist() for name, chosen in selection.tensors.items()}
    assert found == {name: index.tolist() for name, index in planted().items()}
    assert planted(1).keys() != planted().keys() or any(
        (planted(1)[name] != index).any() for name, index in planted().items()
    )
