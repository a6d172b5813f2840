"""Deltas: how blocks are cut, what they are compared with, and which names are taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xxhash
from lossless_support import folder, tensor

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.weight_files import is_plain
from neftsurgery.coding.elements import BLOCK
from neftsurgery.patch.delta import block_hash, block_state, blocks_of, counterpart
from neftsurgery.patch.lossless import LosslessPatch
from neftsurgery.tensors.header import TensorInfo


def test_blocks_cover_every_element_once_and_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {
        "long": ("F8_E4M3", (3, 700_000)),
        "short": ("F32", (5,)),
        "none": ("F32", (0, 9)),
        "c": ("C64", (7,)),
    }
    tensors = {name: tensor(*one, rng) for name, one in shapes.items()} | {
        "full": tensor("U8", (BLOCK,), rng)
    }
    path = folder(tmp_path / "base", tensors, 2)
    ns.extract(path, path, lossless=True, out=tmp_path / "p").close()
    with LosslessPatch.load(tmp_path / "p") as patch:
        delta = patch.forward
        cut: dict[str, list[tuple[int, int]]] = {}
        for number, block in enumerate(delta.blocks):
            assert block.number == number
            cut.setdefault(block.info.name, []).append((block.start, block.stop))
            file = (path / block.file.name).read_bytes()
            content = file[block.offset : block.offset + block.nbytes]
            assert int(delta.after[number]) == int(delta.before[number]) == xxhash.xxh3_64_intdigest(content)
        assert cut == {
            "long": [(0, BLOCK), (BLOCK, 2 * BLOCK), (2 * BLOCK, 2_100_000)],
            "short": [(0, 5)],
            "c": [(0, 14)],
            "full": [(0, BLOCK)],
        }
        assert tuple(blocks_of(delta.files)) == delta.blocks
        assert delta.nbytes == sum(file.stat().st_size for file in path.glob("*.safetensors"))
        assert delta.block_bytes == sum(len(data) for *_, data in tensors.values())
        for file in delta.files:
            assert (path / file.name).read_bytes().startswith(file.start)
        assert delta.block_at("long", BLOCK) is delta.blocks[[b.start for b in delta.blocks].index(BLOCK)]
        for name, start in (("long", 3 * BLOCK), ("long", 5), ("none", 0), ("other", 0)):
            assert delta.block_at(name, start) is None


@pytest.mark.parametrize(
    ("mine", "theirs", "compared"),
    [
        (("F32", (4, 5)), ("F32", (4, 5)), True),
        (("F32", (4, 5)), ("F32", (9, 5)), True),
        (("F32", (4, 5)), ("F32", (4, 6)), False),
        (("F32", (4, 5)), ("F16", (4, 5)), False),
        (("F32", (4, 5)), ("F32", (20,)), False),
        (("F32", ()), ("F32", ()), True),
        (("F32", ()), ("F32", (1,)), False),
        (("F32", (3,)), ("F32", (2,)), True),
    ],
)
def test_what_is_compared_with_what(mine, theirs, compared: bool) -> None:
    other = TensorInfo("w", *theirs)
    assert counterpart(TensorInfo("w", *mine), {"w": other}) == (other if compared else None)
    assert counterpart(TensorInfo("w", *mine), {"v": other}) is None


def test_the_state_of_a_block_that_reaches_beyond_the_source(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base, tuned = {"w": tensor("U8", (3, 4), rng)}, {"w": tensor("U8", (5, 4), rng)}
    folder(tmp_path / "base", base)
    folder(tmp_path / "tuned", tuned)
    with ns.extract(tmp_path / "base", tmp_path / "tuned", lossless=True) as patch:
        (block,) = patch.forward.blocks
        found, state, whole = block_state(Checkpoint.open(tmp_path / "base"), block)
        assert found.tobytes() == base["w"][2] + bytes(8)
        assert (state, whole) == (xxhash.xxh3_64_intdigest(base["w"][2]), False)
        assert int(patch.forward.before[0]) == state
        assert block_state(Checkpoint.open(tmp_path / "tuned"), block)[1:] == (
            int(patch.forward.after[0]),
            True,
        )
    assert block_hash(np.zeros(0, np.uint8)) == 0, "0 stands for nothing"


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.safetensors", True), ("é ⚖.json", True), ("a" * 255, True), ("\udcff.bin", True), ("", False),
        (".", False), ("..", False), ("a/b", False), ("a\\b", False), ("a\0", False), ("a" * 256, False),
        ("é" * 128, False), ("\ud800", False),
    ],
)  # fmt: skip
def test_plain_names(name: str, plain: bool) -> None:
    assert is_plain(name) == plain
