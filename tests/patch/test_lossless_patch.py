"""A lossless patch as a value: what it says of itself, and how both kinds of patch are opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lossless_support import folder, tensor, touched

import neftsurgery as ns
from neftsurgery.patch.lossless import LosslessPatch, load_any
from neftsurgery.patch.patch import Patch

RNG = np.random.default_rng(0)
BASE = {
    "l.0.w": tensor("BF16", (50, 60), RNG),
    "l.1.w": tensor("BF16", (50, 60), RNG),
    "n": tensor("F32", (9,), RNG),
}
TUNED = BASE | {"l.1.w": touched(BASE["l.1.w"], 0.1, RNG), "new": tensor("I8", (4, 4), RNG)}


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    return folder(tmp_path / "base", BASE, 1, {"config.json": b"{}"}), folder(tmp_path / "tuned", TUNED)


@pytest.mark.parametrize("reversible", [False, True])
def test_what_it_says_of_itself(sides: tuple[Path, Path], tmp_path: Path, reversible: bool) -> None:
    ns.extract(*sides, lossless=True, reversible=reversible, out=tmp_path / "p").close()
    with LosslessPatch.load(tmp_path / "p") as patch:
        assert patch.reversible == reversible
        assert (patch.base.name, patch.tuned.name) == ("base", "tuned")
        assert patch.base.fingerprint != patch.tuned.fingerprint
        forms = patch.forms()
        assert forms["same"] == {"blocks": 2, "bytes": 6036, "code": 0}
        assert sum(one["blocks"] for one in forms.values()) == 4
        assert sum(one["blocks"] for form, one in forms.items() if form != "same") == 2
        assert sum(one["bytes"] for one in forms.values()) == 6036 + 6000 + 16
        kinds, weights = patch.kinds(), patch.weights()
        changed = np.frombuffer(BASE["l.1.w"][2], "u2") != np.frombuffer(TUNED["l.1.w"][2], "u2")
        assert kinds["w"].changed == weights["l.1.w"].changed == changed.sum()
        assert kinds["new"].changed == kinds["new"].elements == 16
        assert kinds["n"].changed == 0
        assert ("not reversible" in str(patch)) != reversible
        assert "lossless patch" in str(patch)
        assert repr(patch).startswith("<LosslessPatch")
        assert patch.nbytes == (tmp_path / "p").stat().st_size


def test_what_it_says_is_safe_to_print(tmp_path: Path) -> None:
    steering = "a\x1b[2Jbase"
    base, tuned = folder(tmp_path / steering, BASE), folder(tmp_path / "tuned", TUNED)
    ns.extract(base, tuned, lossless=True, out=tmp_path / "p\x1b").close()
    with LosslessPatch.load(tmp_path / "p\x1b") as patch:
        assert patch.base.name == steering
        assert "\x1b" not in str(patch) + repr(patch)
        assert "a\\x1b[2Jbase" in str(patch)


def test_each_kind_is_opened_as_what_it_is(sides: tuple[Path, Path], tmp_path: Path) -> None:
    ns.extract(*sides, lossless=True, out=tmp_path / "whole").close()
    shared = folder(tmp_path / "shared", {name: one for name, one in TUNED.items() if name != "new"})
    ns.extract(sides[0], shared, changed=True, include=["*"], out=tmp_path / "rows").close()
    with load_any(tmp_path / "whole") as whole, load_any(tmp_path / "rows") as rows:
        assert isinstance(whole, LosslessPatch)
        assert isinstance(rows, Patch)
        assert load_any(whole) is whole
        assert load_any(rows) is rows
    with pytest.raises(ns.MismatchError, match="chosen neurons only"):
        LosslessPatch.load(tmp_path / "rows")
    with pytest.raises(ns.MismatchError, match="whole fine-tune, not chosen neurons"):
        Patch.load(tmp_path / "whole")
    with pytest.raises(ns.UsageError):
        load_any(tmp_path / "missing")
    with pytest.raises(ns.CorruptFileError):
        load_any(sides[0] / "model.safetensors")


def test_a_patch_that_changes_while_it_is_open(sides: tuple[Path, Path], tmp_path: Path) -> None:
    ns.extract(*sides, lossless=True, out=tmp_path / "p").close()
    with LosslessPatch.load(tmp_path / "p") as patch:
        content = (tmp_path / "p").read_bytes()
        (tmp_path / "p").write_bytes(content + b"x")
        with pytest.raises(ns.MachineError):
            ns.apply(sides[0], patch, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
