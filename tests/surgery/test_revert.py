"""revert: the replaced vectors come back, from the patch or from the base, or nothing happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import patch_rows, patched_by_hand, raw_file, raw_folder, snapshot

import neftsurgery as ns

RNG = np.random.default_rng(0)
SHAPES = {"a.weight": (8, 6), "b.weight": (5, 9), "c": (2, 3, 4), "d.weight": (3, 2)}
BASE = {n: ("BF16", RNG.integers(0, 1 << 14, shape, np.uint16)) for n, shape in SHAPES.items()}
TUNED = {n: (kind, bits ^ np.uint16(7)) for n, (kind, bits) in BASE.items()}
OPTIONS = {"neurons": "60%", "axis": {"b.*": 1, "c": (0, 2)}, "score": "random"}


class Setting:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = raw_folder(root / "base", BASE, 2, {"model_type": "?"})
        self.tuned = raw_folder(root / "tuned", TUNED)
        self.plain, self.full = root / "plain", root / "full"
        ns.extract(self.base, self.tuned, out=self.plain, **OPTIONS).close()
        ns.extract(self.base, self.tuned, out=self.full, reversible=True, **OPTIONS).close()
        self.patched = root / "patched"
        ns.apply(self.base, self.plain, out=self.patched)

    def refused(self, error: type[ns.NeftError], call: Callable[[], object], *says: str) -> None:
        before = snapshot(self.root)
        with pytest.raises(error) as caught:
            call()
        for word in says:
            assert word in str(caught.value)
        assert snapshot(self.root) == before


@pytest.fixture
def s(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def test_with_the_base_and_without_are_the_same(s: Setting) -> None:
    """Both give the base back; the two kinds of patch differ in nothing but the replaced values."""
    ns.revert(s.patched, s.full, out=s.root / "by itself")
    ns.revert(s.patched, s.plain, base=s.base, out=s.root / "by base")
    ns.revert(s.patched, s.full, base=s.base, out=s.root / "by both")
    for name in ("by itself", "by base", "by both"):
        assert snapshot(s.root / name) == snapshot(s.base)
    full, plain = patch_rows(s.full), patch_rows(s.plain)
    assert {name for name in full if not name.endswith(":base")} == set(plain)
    for name, (kind, bits) in plain.items():
        assert full[name][0] == kind
        np.testing.assert_array_equal(full[name][1], bits)


def test_the_base_may_be_laid_out_otherwise(s: Setting) -> None:
    file = raw_file(s.root / "base.safetensors", dict(reversed(BASE.items())))
    ns.revert(s.patched, s.plain, base=file, out=s.root / "back")
    assert snapshot(s.root / "back") == snapshot(s.base)


def test_what_the_patch_does_not_touch_stays(s: Setting) -> None:
    """A checkpoint that was trained further elsewhere loses the patch, and only that."""
    further = {n: (k, bits ^ np.uint16(512)) for n, (k, bits) in BASE.items()}
    folder = raw_folder(s.root / "further", patched_by_hand(further, s.plain))
    ns.revert(folder, s.full, out=s.root / "back")
    expected = raw_folder(s.root / "expected", patched_by_hand(further, s.full, "base"))
    assert snapshot(expected) != snapshot(raw_folder(s.root / "all base", BASE))
    assert snapshot(s.root / "back") == snapshot(expected)


def test_of_a_base_it_changes_nothing(s: Setting) -> None:
    ns.revert(s.base, s.full, out=s.root / "back")
    assert snapshot(s.root / "back") == snapshot(s.base)
    before = {path: path.stat().st_mtime_ns for path in s.base.iterdir()}
    ns.revert(s.base, s.full, in_place=True)
    assert {path: path.stat().st_mtime_ns for path in s.base.iterdir()} == before


def test_without_the_replaced_values_and_without_a_base(s: Setting) -> None:
    for options in ({"out": s.root / "out"}, {"in_place": True}):
        s.refused(
            ns.UsageError,
            lambda options=options: ns.revert(s.patched, s.plain, **options),
            str(s.plain),
            "needs the values that the patch replaced, and the patch does not hold them",
            "base=...",
            "reversible=True",
        )


def test_a_wrong_base(s: Setting) -> None:
    for options in ({"out": s.root / "out"}, {"in_place": True}):
        for patch in (s.plain, s.full):
            s.refused(
                ns.MismatchError,
                lambda options=options, patch=patch: ns.revert(s.patched, patch, base=s.tuned, **options),
                str(s.tuned),
                "not the base that the patch was made from",
                "name the right one with base=...",
            )


def test_a_base_that_is_wrong_in_one_bit_of_the_last_vector(s: Setting) -> None:
    """It is found out even though all that comes before it has been written to OUT's staging by then."""
    with ns.Patch.load(s.plain) as patch:
        name = list(patch.tensors)[-1]
        row = int(patch.index(name)[-1])
        assert patch.tensors[name].layout.axes == (0,)
    kind, bits = BASE[name]
    changed = bits.copy()
    changed[row, -1] ^= 1
    wrong = raw_folder(s.root / "wrong", BASE | {name: (kind, changed)})
    for options in ({"out": s.root / "out"}, {"in_place": True}):
        s.refused(
            ns.MismatchError,
            lambda options=options: ns.revert(s.patched, s.plain, base=wrong, **options),
            str(wrong),
            name,
        )


def test_a_base_of_another_model(s: Setting) -> None:
    other = raw_folder(s.root / "other", {"a.weight": ("BF16", np.zeros((6, 8), "u2"))})
    s.refused(
        ns.MismatchError,
        lambda: ns.revert(s.patched, s.plain, base=other, out=s.root / "out"),
        str(other),
        "expected BF16 [8, 6], found BF16 [6, 8]",
    )


def test_a_checkpoint_in_neither_state(s: Setting) -> None:
    other = raw_folder(s.root / "other", {n: (k, bits ^ np.uint16(1)) for n, (k, bits) in BASE.items()})
    for options in ({"out": s.root / "out"}, {"in_place": True}):
        s.refused(
            ns.MismatchError,
            lambda options=options: ns.revert(other, s.full, **options),
            str(other),
            "another base",
            "that are neither",
        )


def test_outputs_that_make_no_sense(s: Setting) -> None:
    for out in (s.patched, s.patched / "in", s.base, s.base / "in", s.plain, s.root):
        for force in (False, True):
            s.refused(
                ns.UsageError,
                lambda out=out, force=force: ns.revert(s.patched, s.plain, base=s.base, out=out, force=force),
                str(out),
            )
    s.refused(
        ns.UsageError, lambda: ns.revert(s.patched, s.full, out=s.tuned), "exists already", "force=True"
    )


def test_force_replaces_the_output(s: Setting) -> None:
    ns.revert(s.patched, s.full, out=s.tuned, force=True)
    assert snapshot(s.tuned) == snapshot(s.base)


def test_no_such_base(s: Setting) -> None:
    missing = s.root / "missing"
    s.refused(
        ns.UsageError,
        lambda: ns.revert(s.patched, s.plain, base=missing, out=s.root / "out"),
        str(missing),
        "no such file or folder",
    )


def test_the_base_itself_in_place_with_the_base(s: Setting) -> None:
    """Patch the base in place and take the values back from a copy of it."""
    before = snapshot(s.base)
    copy = raw_folder(s.root / "copy", BASE)
    ns.apply(s.base, s.plain, in_place=True)
    assert snapshot(s.base) == snapshot(s.patched)
    # Its own vectors are the patched ones now: it is no base any more.
    with pytest.raises(ns.MismatchError, match="not the base"):
        ns.revert(s.base, s.plain, base=s.base, in_place=True)
    ns.revert(s.base, s.plain, base=copy, in_place=True)
    assert snapshot(s.base) == before
