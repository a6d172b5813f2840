"""inspect: a result that is plain values for scripts, and a few lines for people."""

from __future__ import annotations

import json
from pathlib import Path

import neftsurgery as ns


def test_a_result_is_plain_values_and_prints_itself(pair: tuple[Path, Path], tmp_path: Path) -> None:
    patch = ns.extract(*pair, neurons=3, out=tmp_path / "patch")
    found = ns.inspect(tmp_path / "patch")
    assert (found.kind, found["kind"], found["neurons"]) == ("patch", "patch", patch.neurons)
    assert json.loads(json.dumps(found)) == found.to_json()
    assert f"patch  {tmp_path / 'patch'}\n" in str(found)
    assert "neurons  3\n" in str(found)
    assert "revert needs base" in str(found)
    assert repr(found) == f"<Inspection: patch  {tmp_path / 'patch'}>"

    both = ns.inspect([tmp_path / "patch", tmp_path / "patch"])
    assert both.kind == "patches"
    assert "1 and 2  3 neurons in common" in str(both)

    base = ns.inspect(pair[0])
    assert "model type" in str(base)
