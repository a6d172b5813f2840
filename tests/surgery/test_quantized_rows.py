"""Patches of quantized checkpoints: codes and scales to the bit, in units that mean the same numbers."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from quantized_support import LAYOUTS, Quantized, fp8, mxfp4

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.dequantized import dequantized

Pair = tuple[Quantized, Path, Path]


@pytest.fixture(params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    weight = LAYOUTS[request.param](np.random.default_rng(1))
    return weight, weight.write(tmp_path / "base"), weight.moved().write(tmp_path / "tuned")


def numbers(folder: Path, weight: Quantized) -> NDArray[Any]:
    """A neuron a row; how they are read is tested elsewhere."""
    side = dequantized(Checkpoint.open(folder))
    info = side.tensors[weight.name]
    raw = np.empty(info.nbytes, np.uint8)
    side.read_into(weight.name, 0, raw.data)
    whole = raw.view(info.type.carrier).reshape(info.shape)
    front = np.moveaxis(whole, weight.rows, range(len(weight.rows)))
    return front.reshape(int(np.prod(front.shape[: len(weight.rows)])), -1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_laws_of_patches(pair: Pair, tmp_path: Path) -> None:
    weight, base, tuned = pair
    patch = ns.extract(base, tuned, neurons="20%", score="relative", reversible=True, out=tmp_path / "patch")
    chosen = patch.index(weight.codes)
    assert patch.neurons == len(chosen) >= round(0.2 * len(numbers(base, weight)))
    ns.apply(base, patch, out=tmp_path / "patched")
    a, b, found = (numbers(one, weight) for one in (base, tuned, tmp_path / "patched"))
    assert (a[chosen] != b[chosen]).any(axis=1).all()  # none came along that did not change
    assert np.array_equal(found[chosen], b[chosen])
    untouched = np.setdiff1d(np.arange(len(a)), chosen)
    assert np.array_equal(found[untouched], a[untouched])
    assert ns.verify(base, patch).state == "base"
    assert ns.verify(tmp_path / "patched", patch).state == "patched"
    ns.revert(tmp_path / "patched", patch, out=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    before = contents(base)
    ns.apply(base, patch, in_place=True)
    assert contents(base) == contents(tmp_path / "patched")
    ns.revert(base, patch, in_place=True)
    assert contents(base) == before


def test_all_that_changed_makes_the_tuned_checkpoint(pair: Pair, tmp_path: Path) -> None:
    _, base, tuned = pair
    patch = ns.extract(base, tuned, changed=True)
    ns.apply(base, patch, out=tmp_path / "patched")
    assert contents(tmp_path / "patched") == contents(tuned)
    ns.revert(tuned, patch, base=base, out=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def parts(base: Path, tuned: Path, weight: Quantized, folder: Path) -> list[ns.Patch]:
    """Two patches of neurons that are not in both."""
    whole = ns.extract(base, tuned, changed=True).index(weight.codes)
    scores = ns.diff(base, tuned)
    found = []
    for number in range(2):
        limits = {weight.name: len(whole) // 3}
        policy = ("sensitive", "reversed")[number]
        selection = scores.select(like=limits, policy=policy)
        found.append(ns.extract(base, tuned, selection, out=folder / f"part {number}"))
    return found


def test_disjoint_patches_merge_in_any_order(pair: Pair, tmp_path: Path) -> None:
    weight, base, tuned = pair
    p, q = parts(base, tuned, weight, tmp_path)
    if np.intersect1d(p.index(weight.codes), q.index(weight.codes)).size:
        with pytest.raises(ns.MismatchError, match="overlap"):
            ns.merge([p, q])
        merged = [ns.merge([p, q], on_overlap=rule) for rule in ("first", "last")]
    else:
        merged = [ns.merge([p, q]), ns.merge([q, p]), ns.merge([p, q], on_overlap="mean")]
    expected = np.union1d(p.index(weight.codes), q.index(weight.codes))
    a, b = numbers(base, weight), numbers(tuned, weight)
    a[expected] = b[expected]
    for number, patch in enumerate(merged):
        ns.apply(base, patch, out=tmp_path / f"out {number}")
        assert np.array_equal(numbers(tmp_path / f"out {number}", weight), a)
        assert patch.groups == p.groups
        assert patch.neurons == len(expected)


def with_scales(weight: Quantized, row: int) -> Quantized:
    """The weight with other scales in a row of them."""
    kind, bits = weight.tensors[weight.scales]
    bits = bits.copy()
    bits[row] += 3
    return replace(weight, tensors={**weight.tensors, weight.scales: (kind, bits)})


def with_codes(weight: Quantized, row: int) -> Quantized:
    """The weight with other codes in a row of them."""
    kind, bits = weight.tensors[weight.codes]
    bits = bits.copy()
    bits[row] ^= 1
    return replace(weight, tensors={**weight.tensors, weight.codes: (kind, bits)})


def test_blocks_whose_scales_stay_are_cut_row_by_row(tmp_path: Path) -> None:
    weight = fp8(np.random.default_rng(0), "block")
    base = weight.write(tmp_path / "base")
    tuned = with_codes(with_scales(weight, 1), 3).write(tmp_path / "tuned")
    patch = ns.extract(base, tuned, changed=True)
    assert patch.index(weight.codes).tolist() == [3, *range(128, 256)]
    assert patch.index(weight.scales).tolist() == [0, 1]
    assert patch.neurons == 129
    only_scales = with_scales(weight, 1).write(tmp_path / "scales")
    one = ns.extract(base, only_scales, neurons=1, score="relative")
    assert one.index(weight.codes).tolist() == [*range(128, 256)]


def test_patches_of_a_block_that_change_its_scales_in_two_ways(tmp_path: Path) -> None:
    """The block of one is not read with the scales of the other."""
    weight = fp8(np.random.default_rng(0), "block")
    base = weight.write(tmp_path / "base")
    sides = {
        "scales": with_scales(weight, 0),
        "more scales": with_scales(with_scales(weight, 0), 0),
        "row": with_codes(weight, 5),
        "other row": with_codes(weight, 6),
    }
    patches = {
        name: ns.extract(base, side.write(tmp_path / name), changed=True, out=tmp_path / f"{name}.patch")
        for name, side in sides.items()
    }
    rows = ns.merge([patches["row"], patches["other row"]])
    assert rows.index(weight.codes).tolist() == [5, 6]
    for rule in ("error", "first", "last"):
        with pytest.raises(ns.MismatchError) as caught:
            ns.merge([patches["scales"], patches["row"]], on_overlap=rule)
        assert caught.value.tensor in (weight.scales, weight.codes)
    last = ns.merge([patches["scales"], patches["more scales"]], on_overlap="last")
    ns.apply(base, last, out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "more scales")
    for rule in ("mean", "sum", "ties"):
        with pytest.raises(ns.MismatchError, match="codes of quantized weights are not numbers"):
            ns.merge([patches["scales"], patches["more scales"]], on_overlap=rule, base=base)
    ns.apply(base, [patches["row"], patches["scales"]], out=tmp_path / "whole units win")
    assert contents(tmp_path / "whole units win") == contents(tmp_path / "scales")
    with pytest.raises(ns.MismatchError, match="keeps scales that another patch changes"):
        ns.apply(base, [patches["scales"], patches["row"]], out=tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_columns_of_quantized_weights_are_not_cut(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = mxfp4(rng, out=64)
    base, tuned = weight.write(tmp_path / "a"), weight.moved().write(tmp_path / "b")
    with pytest.raises(ns.MismatchError, match=r"(?s)across the rows.*anatomy='?rows"):
        ns.extract(base, tuned, neurons=3, axis={"*gate_up_proj": (0, 1)}, out=tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


KILLED = """
import os, signal, sys
import neftsurgery as ns
write, left = os.pwrite, int(sys.argv[3])
def counted(*given):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*given)
os.pwrite = counted
ns.apply(sys.argv[1], sys.argv[2], in_place=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("layout", ["fp8 blocks", "mxfp4"])
def test_a_change_in_place_that_was_killed_heals(layout: str, tmp_path: Path) -> None:
    weight = LAYOUTS[layout](np.random.default_rng(1))
    base, tuned = weight.write(tmp_path / "base"), weight.moved().write(tmp_path / "tuned")
    ns.extract(base, tuned, changed=True, out=tmp_path / "patch").close()
    before, after, torn = contents(base), contents(tuned), 0
    for writes in range(1, 12, 2):
        words = [sys.executable, "-c", KILLED, base, tmp_path / "patch", str(writes)]
        status = subprocess.run(words, check=False).returncode
        if status == 0:
            break
        assert status == -signal.SIGKILL
        torn += {name: contents(base)[name] for name in before} not in (before, after)
        ns.heal(base)
        assert {name: contents(base)[name] for name in before} == before
    assert torn
    with ns.Patch.load(tmp_path / "patch") as patch:
        ns.apply(base, patch, in_place=True)
    assert contents(base) == after


def test_a_patch_of_numbers_does_not_go_on_codes(tmp_path: Path) -> None:
    for layout, weight in ((name, make(np.random.default_rng(0))) for name, make in LAYOUTS.items()):
        folder = tmp_path / layout
        folder.mkdir()
        quantized = weight.write(folder / "quantized")
        base, tuned = (weight.original(folder / str(seed), 1e-3, seed)[0] for seed in (1, 2))
        patch = ns.extract(base, tuned, neurons=2)
        with pytest.raises(ns.MismatchError, match=r"(?s)is quantized: .*quantize the result again"):
            ns.apply(quantized, patch, out=folder / "out")
        with pytest.raises(ns.MismatchError, match="in two ways"):
            ns.extract(base, quantized, neurons=2, out=folder / "out")
        assert not (folder / "out").exists()
        own = ns.extract(quantized, weight.moved().write(folder / "tuned"), neurons=2)
        with pytest.raises(ns.MismatchError, match="the patch holds codes of quantized weights"):
            ns.apply(base, own, out=folder / "out")


def test_a_lossless_patch_of_quantized_checkpoints(pair: Pair, tmp_path: Path) -> None:
    _, base, tuned = pair
    patch = ns.extract(base, tuned, lossless=True)
    ns.apply(base, patch, out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tuned)
    ns.revert(tuned, patch, base=base, out=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_inspect_says_what_can_be_replaced_by_itself(pair: Pair) -> None:
    weight, base, tuned = pair
    found = ns.inspect(base)
    (layout,) = found["quantized"]
    assert layout["weights"] == 1
    assert ("together" in layout["unit"] or "all rows" in layout["unit"]) == (
        "_g_idx" in str(weight.tensors) or weight.share > 1
    )
    (tensor,) = found["tensors"]
    assert tensor["stored_as"]["tensors"]["codes"] == weight.codes
    assert tensor["shape"] == list(weight.numbers.shape)
    assert found["parameters"] == weight.numbers.size
    assert f"quantized  1 weight in {layout['layout']}: row by row" in str(found)
    patch = ns.extract(base, tuned, changed=True)
    assert "quantized  1 weight: codes, with their scales" in str(ns.inspect(patch_file(patch, base)))


def patch_file(patch: ns.Patch, beside: Path) -> Path:
    path = beside.with_name("patch.safetensors")
    patch.save(path)
    return path


def test_a_lora_of_codes_is_refused(tmp_path: Path) -> None:
    weight = fp8(np.random.default_rng(0), "channel")
    base, tuned = weight.write(tmp_path / "a"), weight.moved().write(tmp_path / "b")
    with pytest.raises(ns.MismatchError, match="not numbers to factor"):
        ns.export_lora(ns.extract(base, tuned, neurons=3), tmp_path / "lora", base=base)


def test_rows_whose_zero_points_share_a_word(tmp_path: Path) -> None:
    weight = LAYOUTS["int4 groups with packed zero points"](np.random.default_rng(0))
    name = weight.scales.replace("_scale", "_zero_point")
    kind, words = weight.tensors[name]
    words = words.copy()
    words[1] ^= 0x10  # of row 9
    base = weight.write(tmp_path / "base")
    tuned = replace(weight, tensors={**weight.tensors, name: (kind, words)}).write(tmp_path / "tuned")
    patch = ns.extract(base, tuned, changed=True)
    assert patch.index(weight.codes).tolist() == list(range(8, 16))
    assert patch.index(name).tolist() == [1]
    ns.apply(base, patch, out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tuned)
