"""Patches that an earlier version wrote, as they were: they make the same files for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lossless_golden import EXPECTED, FOLDER, make
from lossless_support import contents

import neftsurgery as ns
from neftsurgery.coding.blocks import Form

PATCHES = sorted(FOLDER.glob("lossless-*.safetensors"))
KNOWN = json.loads(EXPECTED.read_text())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("golden"))


def test_the_pair_is_the_one_that_they_were_made_from(pair: tuple[Path, Path]) -> None:
    assert (contents(pair[0]), contents(pair[1])) == (KNOWN["base"], KNOWN["tuned"])


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_golden_patch_makes_the_recorded_files(
    patch: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    ns.apply(pair[0], patch, out=tmp_path / "out")
    assert contents(tmp_path / "out") == KNOWN["tuned"]
    assert ns.verify(tmp_path / "out", patch).state == "patched"
    if ns.LosslessPatch.load(patch).reversible:
        ns.revert(tmp_path / "out", patch, out=tmp_path / "back")
        assert contents(tmp_path / "back") == KNOWN["base"]


def test_they_have_every_form_and_both_kinds_of_table_and_are_small() -> None:
    patches = [ns.LosslessPatch.load(path) for path in PATCHES]
    assert {form for patch in patches for form in patch.forward.forms} == set(Form)
    tables = [table for patch in patches for table in patch.forward.tables]
    assert {table.gaps is None for table in tables} == {True, False}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 100_000
