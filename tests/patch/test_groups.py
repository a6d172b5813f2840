"""Groups of a patch that do not say what goes together, or leave out what must: refused when it is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_support import Quantized, fp8
from support import patch_manifest, raw_file, raw_read, sealed

import neftsurgery as ns

Manifest = dict[str, Any]


class Case:
    """A patch of a weight in FP8 blocks: one row whose scales stay, and a block whose scales change."""

    def __init__(self, folder: Path) -> None:
        self.weight = fp8(np.random.default_rng(0), "block")
        self.base = self.weight.write(folder / "base")
        self.path = folder / "patch"
        tuned = Quantized(**vars(self.weight) | {"tensors": self._changed()})
        ns.extract(self.base, tuned.write(folder / "tuned"), changed=True, out=self.path).close()
        self.manifest: Manifest = patch_manifest(self.path)
        self.entries = {name: (kind, bits.copy()) for name, (kind, bits) in raw_read(self.path).items()}

    def _changed(self) -> dict[str, tuple[str, Any]]:
        found = {name: (kind, bits.copy()) for name, (kind, bits) in self.weight.tensors.items()}
        found[self.weight.codes][1][3] ^= 1
        found[self.weight.scales][1][1] ^= 1
        return found

    def write(self) -> Path:
        index = self.entries["index"][1].tobytes()
        metadata = sealed(self.manifest, [("index", index)])
        return raw_file(self.path.with_name("bad"), dict(sorted(self.entries.items())), metadata)

    @property
    def group(self) -> dict[str, Any]:
        (group,) = self.manifest["groups"]
        found: dict[str, Any] = group
        return found


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_a_group_says_what_it_is(case: Case) -> None:
    weight = case.weight
    assert case.group == {
        "layout": "fp8",
        "members": {"codes": weight.codes, "scales": weight.scales},
        "shares": {"scales": 128},
    }
    with ns.Patch.load(case.write()) as patch:
        assert patch.neurons == 129
        assert patch.index(weight.scales).tolist() == [0, 1]


EDITS: dict[str, Callable[[Manifest], object]] = {
    "no codes": lambda group: group["members"].update(other=group["members"].pop("codes")),
    "no shares": lambda group: group.pop("shares"),
    "shares of other members": lambda group: group.update(shares={"zero_points": 128}),
    "shares that are no counts": lambda group: group.update(shares={"scales": True}),
    "a share of nothing": lambda group: group.update(shares={"scales": 0}),
    "a share that is not that of the shapes": lambda group: group.update(shares={"scales": 64}),
    "other rows than those that need them": lambda group: group.update(shares={"scales": 149}),
    "members exchanged": lambda group: group["members"].update(
        codes=group["members"]["scales"], scales=group["members"]["codes"]
    ),
    "a member twice": lambda group: group["members"].update(scales=group["members"]["codes"]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_groups_that_make_no_sense(case: Case, edit: Callable[[Manifest], object]) -> None:
    edit(case.group)
    with pytest.raises(ns.CorruptFileError, match="group"):
        ns.Patch.load(case.write())


def test_a_tensor_in_two_groups(case: Case) -> None:
    case.manifest["groups"] *= 2
    with pytest.raises(ns.CorruptFileError, match="in two"):
        ns.Patch.load(case.write())


def test_scales_that_change_without_a_row_that_needs_them(case: Case) -> None:
    """Whoever takes a row out of a block would have it read with scales that are not its own."""
    row, width = 50, 200
    kind, index = case.entries["index"]
    assert index[row] == 128 + row - 1
    case.entries["index"] = (kind, np.delete(index, row))
    kind, digests = case.entries["base_digest"]
    case.entries["base_digest"] = (kind, np.delete(digests, row, axis=0))
    kind, values = case.entries["value:F8_E4M3"]
    case.entries["value:F8_E4M3"] = (kind, np.delete(values, slice(row * width, (row + 1) * width)))
    case.manifest["tensors"][case.weight.codes]["rows"] -= 1
    with pytest.raises(ns.CorruptFileError, match="scales change without all rows") as caught:
        ns.Patch.load(case.write())
    assert caught.value.tensor == case.weight.codes


def test_the_format_names_every_layout(case: Case) -> None:
    text = (Path(__file__).parents[2] / "docs" / "patch-format.md").read_text()
    for layout in ("fp8", "mxfp4", "int8", "packed-int"):
        assert f"| `{layout}` |" in text
    assert json.dumps(case.group["shares"]) in text
