"""inspect: a result that is plain values for scripts, and a few lines for people."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from lossless_support import folder, tensor, touched
from support import Result

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


def test_a_lossless_patch_says_per_kind_how_it_is_stored(
    neft: Callable[..., Result], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    ns.extract(*pair, lossless=True, out=tmp_path / "whole").close()
    found = ns.inspect(tmp_path / "whole")
    keys = {"kind", "lossless", "bytes", "tuned_bytes", "sha256", "files", "side_files", "not_carried"}
    assert keys | {"forms", "weights", "tensors", "reversible", "base", "tuned"} <= found.keys()
    kinds = {kind["name"]: kind for kind in found["weights"]}
    up = [info for info in found["tensors"] if "up_proj" in info["name"]]
    assert [info["shape"] for info in up] == [[48, 32]] * 2
    assert kinds["mlp.up_proj"]["tensors"] == 2
    for key in ("elements", "changed", "tuned_bytes", "code"):
        assert kinds["mlp.up_proj"][key] == sum(info[key] for info in up)
    assert found["bytes"] > sum(kind["code"] for kind in kinds.values()) > 0
    assert json.loads(json.dumps(found)) | {"name": "whole"} == neft("inspect", "whole", "--json").json

    together = neft("inspect", "whole", "whole")
    assert (together.code, "inspected by itself" in together.err) == (2, True)

    for text in (str(found), neft("inspect", "whole").out):
        rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
        assert rows["mlp.up_proj"][1:3] == ["2", "3,072"]
        assert rows["mlp.up_proj"][4:6] == ["12.3", "kB"]
        assert rows["input_layernorm"][3] == "0%"
        assert rows["input_layernorm"][-2:] == ["same", "100%"]
        assert "not carried" not in text


def test_of_many_kinds_the_largest_are_printed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {f"kind_{chr(97 + n // 26)}{chr(97 + n % 26)}": tensor("U8", (64,), rng) for n in range(50)}
    tuned = {name: touched(one, 0.5, rng) if name == "kind_bx" else one for name, one in base.items()}
    sides = folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)
    ns.extract(*sides, lossless=True, out=tmp_path / "p").close()
    table = ns.inspect(tmp_path / "p").tables[1]
    assert [row[0] for row in table[:2]] == ["kind of weight", "kind_bx"]
    assert len(table) == 1 + 40 + 1
    assert table[-1][0] == "and 10 more"
    assert {len(row) for row in table} == {8}
