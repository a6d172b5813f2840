"""Patch files as they are written down: every version must load, verify and apply for ever."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors import safe_open
from support import (
    assert_same_tensors,
    content_hash,
    patch_rows,
    raw_file,
    raw_folder,
    raw_read,
    snapshot,
    vectors_of,
)

import neftsurgery as ns

#: Written by hand, not by this package: rows 0 and 2 of a [3, 2] BF16 weight, and neurons 1 and 5 of
#: experts [2, 2, 3] in F32 with neuron axes 0 and 2. Never to be changed.
GOLDEN = """
aAUAAAAAAAB7Il9fbWV0YWRhdGFfXyI6IHsibmV1cm9uX3BhdGNoIjogIntcInZlcnNpb25cIjoxLFwiYmFzZVwiOntcInJlcG9c
IjpcIm9yZy9tb2RlbFwiLFwicmV2aXNpb25cIjpcImFiY1wiLFwibmFtZVwiOlwibW9kZWxcIixcImZpbmdlcnByaW50XCI6bnVs
bH0sXCJzZWxlY3Rpb25cIjp7XCJzY29yZVwiOlwiY29zaW5lXCIsXCJwb2xpY3lcIjpcInNlbnNpdGl2ZVwiLFwiYnVkZ2V0XCI6
e1wibmV1cm9uc1wiOlwiNDAlXCJ9LFwiYW5hdG9teVwiOlwicm93c1wiLFwiY2FwdHVyZWRcIjowLjV9LFwiY3JlYXRlZF9ieVwi
OlwiZ29sZGVuXCIsXCJ0ZW5zb3JzXCI6e1wiYmxvY2tzLjAud2VpZ2h0XCI6e1wic2hhcGVcIjpbMywyXSxcImR0eXBlXCI6XCJC
RjE2XCIsXCJuZXVyb25fYXhlc1wiOlswXSxcImJhc2VfaGFzaFwiOlwieHhoMy0xMjg6YTgyYzhhYTNhYzgzZjA5MmVhODljZjNl
NzNiMDgyZGNcIixcInBhdGNoZWRfaGFzaFwiOlwieHhoMy0xMjg6YTM4NmRjOGRlNmU0ZWVlYjBmZTQ3OTQ3ZjY5ZDY0ODVcIn0s
XCJleHBlcnRzXCI6e1wic2hhcGVcIjpbMiwyLDNdLFwiZHR5cGVcIjpcIkYzMlwiLFwibmV1cm9uX2F4ZXNcIjpbMCwyXSxcImJh
c2VfaGFzaFwiOlwieHhoMy0xMjg6ZWVlNTc0N2QzYjA5OTQxOTAyNjQzZDA1MzYzNjg4ODhcIixcInBhdGNoZWRfaGFzaFwiOlwi
eHhoMy0xMjg6MDBmYjdkY2RhZDNiNjEzNjU2NzQ3OGE0OWY0MTBhZjVcIn19fSJ9LCAiYmxvY2tzLjAud2VpZ2h0OmluZGV4Ijog
eyJkdHlwZSI6ICJJMzIiLCAic2hhcGUiOiBbMl0sICJkYXRhX29mZnNldHMiOiBbMCwgOF19LCAiYmxvY2tzLjAud2VpZ2h0OnZh
bHVlIjogeyJkdHlwZSI6ICJCRjE2IiwgInNoYXBlIjogWzIsIDJdLCAiZGF0YV9vZmZzZXRzIjogWzgsIDE2XX0sICJibG9ja3Mu
MC53ZWlnaHQ6YmFzZV9kaWdlc3QiOiB7ImR0eXBlIjogIlU4IiwgInNoYXBlIjogWzIsIDE2XSwgImRhdGFfb2Zmc2V0cyI6IFsx
NiwgNDhdfSwgImJsb2Nrcy4wLndlaWdodDpiYXNlIjogeyJkdHlwZSI6ICJCRjE2IiwgInNoYXBlIjogWzIsIDJdLCAiZGF0YV9v
ZmZzZXRzIjogWzQ4LCA1Nl19LCAiZXhwZXJ0czppbmRleCI6IHsiZHR5cGUiOiAiSTMyIiwgInNoYXBlIjogWzJdLCAiZGF0YV9v
ZmZzZXRzIjogWzU2LCA2NF19LCAiZXhwZXJ0czp2YWx1ZSI6IHsiZHR5cGUiOiAiRjMyIiwgInNoYXBlIjogWzIsIDJdLCAiZGF0
YV9vZmZzZXRzIjogWzY0LCA4MF19LCAiZXhwZXJ0czpiYXNlX2RpZ2VzdCI6IHsiZHR5cGUiOiAiVTgiLCAic2hhcGUiOiBbMiwg
MTZdLCAiZGF0YV9vZmZzZXRzIjogWzgwLCAxMTJdfSwgImV4cGVydHM6YmFzZSI6IHsiZHR5cGUiOiAiRjMyIiwgInNoYXBlIjog
WzIsIDJdLCAiZGF0YV9vZmZzZXRzIjogWzExMiwgMTI4XX19ICAgICAgAAAAAAIAAACAvwDAwH8BAFcNhJNnOixlZgXQyWhyiVav
9HZ1bJU0ZMK46knEf4/7gD8AQKBAwEABAAAABQAAAAAAwL8AAMhCAAAAAAAAAIA8wrVMCOneYdn9UJWeHB7Wbi3apQeXbQmB7BfS
KKltkgAAgD8AAIBAAAAAQQAAMEE=
"""

BASE = {
    "blocks.0.weight": ("BF16", np.array([[0x3F80, 0x4000], [0x4040, 0x4080], [0x40A0, 0x40C0]], "u2")),
    "experts": ("F32", np.arange(12, dtype="f4").view("u4").reshape(2, 2, 3)),
}
PATCHED = {
    "blocks.0.weight": ("BF16", np.array([[0xBF80, 0xC000], [0x4040, 0x4080], [0x7FC0, 0x0001]], "u2")),
    "experts": (
        "F32",
        np.array([[[0, -1.5, 2], [3, 100, 5]], [[6, 7, 0.0], [9, 10, -0.0]]], "f4").view("u4"),
    ),
}
BASE_HASH = "xxh3-128:a82c8aa3ac83f092ea89cf3e73b082dc"
PATCHED_HASH = "xxh3-128:a386dc8de6e4eeeb0fe47947f69d6485"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    path = tmp_path / "neuron_patch.safetensors"
    path.write_bytes(base64.b64decode(GOLDEN))
    return path


def test_the_golden_patch_loads(golden: Path) -> None:
    patch = ns.Patch.load(golden)
    patch.check()
    assert list(patch.tensors) == ["blocks.0.weight", "experts"]
    assert patch.index("blocks.0.weight").tolist() == [0, 2]
    assert patch.index("experts").tolist() == [1, 5]
    assert patch.values("blocks.0.weight").tobytes().hex() == "80bf00c0c07f0100"
    assert patch.base_values("blocks.0.weight").tobytes().hex() == "803f0040a040c040"
    assert patch.values("experts").view("<f4").tolist() == [[-1.5, 100], [0, 0]]
    assert patch.base_values("experts").view("<f4").tolist() == [[1, 4], [8, 11]]
    assert patch.base_digests("blocks.0.weight")[0].tobytes().hex() == "570d8493673a2c656605d0c968728956"
    tensor = patch.tensors["blocks.0.weight"]
    assert (tensor.base_hash, tensor.patched_hash) == (BASE_HASH, PATCHED_HASH)
    assert (patch.neurons, patch.parameters, patch.reversible) == (4, 8, True)
    assert patch.base == {"repo": "org/model", "revision": "abc", "name": "model", "fingerprint": None}
    assert patch.facts["captured"] == 0.5
    assert patch.manifest["created_by"] == "golden"
    assert patch.manifest["version"] == 1


@pytest.mark.parametrize("shards", [1, 2])
def test_the_golden_patch_applies(golden: Path, shards: int, tmp_path: Path) -> None:
    base = raw_folder(tmp_path / "base", BASE, shards)
    assert ns.verify(base, golden).state == "base"
    ns.apply(base, golden, out=tmp_path / "out")
    assert_same_tensors(raw_read(tmp_path / "out"), PATCHED)
    assert ns.verify(tmp_path / "out", golden).state == "patched"
    ns.revert(tmp_path / "out", golden, out=tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(base)


def test_extract_writes_what_the_golden_patch_says(golden: Path, tmp_path: Path) -> None:
    """The same neurons, cut out by this package: the same entries, bit for bit."""
    base, tuned = raw_folder(tmp_path / "base", BASE), raw_folder(tmp_path / "tuned", PATCHED)
    axis = {"experts": (0, 2)}
    ns.extract(base, tuned, changed=True, axis=axis, reversible=True, out=tmp_path / "p").close()
    fresh, known = manifest(tmp_path / "p"), manifest(golden)
    assert fresh["tensors"] == {
        name: entry | {"rows": 2, "reversible": True} for name, entry in known["tensors"].items()
    }
    assert_same_tensors(patch_rows(tmp_path / "p"), raw_read(golden))


def manifest(path: Path) -> dict:
    with safe_open(path, "numpy") as file:
        assert set(file.metadata()) == {"neuron_patch"}
        return json.loads(file.metadata()["neuron_patch"])


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, a tuned checkpoint and a fresh reversible patch of rows, columns, experts and a bias."""
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (9, 5), "b.weight": (4, 3000), "c": (2, 3, 4), "a.bias": (9,)}
    base = {n: ("F32", rng.integers(0, 1 << 30, shape, np.uint32)) for n, shape in shapes.items()}
    tuned = {
        n: (kind, bits ^ (rng.random(bits.shape) < 0.3).astype("u4")) for n, (kind, bits) in base.items()
    }
    first, second = raw_folder(tmp_path / "base", base, 2), raw_folder(tmp_path / "tuned", tuned)
    axis = {"b.weight": 1, "c": (0, 2)}
    out = tmp_path / "p.safetensors"
    ns.extract(first, second, changed=True, with_bias=True, axis=axis, reversible=True, out=out).close()
    return first, second, out


AXES = {"a.weight": (0,), "b.weight": (1,), "c": (0, 2), "a.bias": (0,)}


def test_the_manifest_has_the_documented_keys(written: tuple[Path, Path, Path]) -> None:
    found = manifest(written[2])
    assert set(found) == {
        "version", "kind", "base", "selection", "created_by", "tensors", "content_hash"
    }  # fmt: skip
    assert (found["version"], found["kind"]) == (2, "neurons")
    assert set(found["base"]) == {"name", "fingerprint"}
    assert found["base"]["name"] == "base"
    assert set(found["selection"]) <= {
        "score", "policy", "budget", "anatomy", "seed", "captured", "captured_scored", "followers"
    }  # fmt: skip
    assert {"score", "policy", "budget", "anatomy", "captured"} <= set(found["selection"])
    assert found["created_by"] == f"neftsurgery {ns.__version__}"
    assert set(found["tensors"]) == set(AXES)
    for name, entry in found["tensors"].items():
        assert set(entry) == {
            "shape", "dtype", "neuron_axes", "rows", "reversible", "base_hash", "patched_hash"
        }  # fmt: skip
        assert entry["reversible"] is True
        assert entry["neuron_axes"] == list(AXES[name])


def test_the_entries_are_the_documented_ones(written: tuple[Path, Path, Path]) -> None:
    kinds = {name: kind for name, (kind, _) in raw_read(written[2]).items()}
    assert kinds == {"index": "I32", "base_digest": "U8", "value:F32": "F32", "base:F32": "F32"}
    assert [bits.ndim for _, bits in raw_read(written[2]).values()].count(1) == 3
    entries = patch_rows(written[2])
    parts = ("index", "value", "base_digest", "base")
    assert set(entries) == {f"{name}:{part}" for name in AXES for part in parts}
    base, tuned = raw_read(written[0]), raw_read(written[1])
    for name, axes in AXES.items():
        old, new = (vectors_of(side[name][1], axes) for side in (base, tuned))
        index = entries[f"{name}:index"][1].view("<i4")
        assert entries[f"{name}:index"][0] == "I32"
        np.testing.assert_array_equal(np.unique(index), index)
        differing = np.flatnonzero((old != new).any(axis=1))
        if name == "a.bias":  # goes along with its neurons, changed or not
            differing = np.union1d(differing, entries["a.weight:index"][1])
        np.testing.assert_array_equal(index, differing)
        for part, expected in (("value", new), ("base", old)):
            kind, bits = entries[f"{name}:{part}"]
            assert kind == "F32"
            np.testing.assert_array_equal(bits, expected[index])


def test_digests_are_xxh3_128_of_the_vectors_bytes(written: tuple[Path, Path, Path]) -> None:
    entries, found = patch_rows(written[2]), manifest(written[2])
    base, tuned = raw_read(written[0]), raw_read(written[1])
    for name, axes in AXES.items():
        digests = {}
        for side, tensors in (("base", base), ("patched", tuned)):
            rows = vectors_of(tensors[name][1], axes)[entries[f"{name}:index"][1]]
            # Canonical big-endian: the digest is its hexadecimal text, byte for byte.
            digests[side] = b"".join(bytes.fromhex(xxhash.xxh3_128(r.tobytes()).hexdigest()) for r in rows)
            whole = xxhash.xxh3_128(digests[side]).hexdigest()
            assert found["tensors"][name][f"{side}_hash"] == f"xxh3-128:{whole}"
        kind, stored = entries[f"{name}:base_digest"]
        assert (kind, stored.shape[1]) == ("U8", 16)
        assert stored.tobytes() == digests["base"]


def test_the_content_hash_is_the_documented_one(written: tuple[Path, Path, Path]) -> None:
    with safe_open(written[2], "numpy") as file:
        text = file.metadata()["neuron_patch"]
    found = json.loads(text)["content_hash"]
    zeros = text.replace(found, f"xxh3-128:{0:032}")
    assert found == content_hash(zeros, [("index", raw_read(written[2])["index"][1].tobytes())])


def fingerprint_by_hand(tensors: dict[str, tuple[str, np.ndarray]]) -> str:
    state = xxhash.xxh3_128()
    for name in sorted(tensors):
        kind, bits = tensors[name]
        data = bits.tobytes()
        shape = ",".join(map(str, bits.shape))
        state.update(f"[{json.dumps(name)},{json.dumps(kind)},[{shape}]]\n".encode("ascii"))
        state.update(data[:4096])
        state.update(data[max(0, len(data) - 4096) :])
    return f"xxh3-128:{state.hexdigest()}"


def test_the_fingerprint_is_the_documented_one(written: tuple[Path, Path, Path]) -> None:
    found = manifest(written[2])["base"]["fingerprint"]
    assert found == fingerprint_by_hand(raw_read(written[0]))


@pytest.mark.parametrize("where", [0, 4095, 4096, -4096, -1])
def test_the_fingerprint_sees_edges_names_types_and_shapes(tmp_path: Path, where: int) -> None:
    """Not shards, not metadata, and not what lies between the edges."""
    name = 'ünïcode "☃'
    bits = np.arange(20_000, dtype="u1").reshape(40, 500)
    tensors = {name: ("F8_E5M2", bits), "z": ("F32", np.zeros(0, "u4")), "s": ("F16", np.array(7, "u2"))}
    plain = raw_file(tmp_path / "plain", tensors)
    expected = fingerprint_by_hand(tensors)
    assert fingerprint_of(plain) == expected
    sharded = raw_folder(tmp_path / "sharded", tensors, 3)
    assert fingerprint_of(sharded) == expected
    changed = bits.copy()
    changed.ravel()[where] ^= 1
    other = raw_file(tmp_path / "other", tensors | {name: ("F8_E5M2", changed)})
    seen = where not in (4096,)
    assert (fingerprint_of(other) != expected) is seen


def fingerprint_of(checkpoint: Path) -> str:
    from neftsurgery.checkpoint.provenance import fingerprint

    return fingerprint(ns.Checkpoint.open(checkpoint))


@pytest.mark.parametrize("count", [1, 1 << 31, (1 << 31) + 1])
def test_indices_are_i32_up_to_where_they_fit(count: int) -> None:
    from neftsurgery.selection.selection import index_dtype

    kind = index_dtype(count)
    largest = {"I32": np.iinfo(np.int32), "I64": np.iinfo(np.int64)}[kind].max
    assert count - 1 <= largest
    assert kind == ("I32" if count - 1 <= np.iinfo(np.int32).max else "I64")


def test_i64_indices_are_read_as_well(golden: Path, tmp_path: Path) -> None:
    """A reader takes both, whatever the tensor's size."""
    data = raw_read(golden)
    with safe_open(golden, "numpy") as file:
        metadata = file.metadata()
    entries = [
        (n, "I64", list(b.shape), b.astype("<i8").tobytes()) if n.endswith(":index") else
        (n, kind, list(b.shape), b.tobytes())
        for n, (kind, b) in data.items()
    ]  # fmt: skip
    wide = raw_file(tmp_path / "wide", entries, metadata)
    base = raw_folder(tmp_path / "base", BASE)
    ns.apply(base, wide, out=tmp_path / "out")
    assert_same_tensors(raw_read(tmp_path / "out"), PATCHED)
