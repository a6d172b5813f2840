"""Fingerprints: their definition written out again, and what they notice. The same base, and does it fit?"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray
from support import write_file, write_folder

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.provenance import (
    Provenance,
    fingerprint,
    require_same_files,
    require_tensors,
    same_files,
    same_tensor,
)
from neftsurgery.sources.resolve import Source
from neftsurgery.tensors.header import TensorInfo

Arrays = dict[str, NDArray[np.generic]]
RNG = np.random.default_rng(0)
ARRAYS: Arrays = {
    "large": RNG.standard_normal((300, 40)).astype(np.float32),  # 48000 bytes: its middle does not count
    "just": RNG.standard_normal(2048).astype(np.float32),  # 8192 bytes
    "less": RNG.standard_normal(1500).astype(np.float32),  # first and last part overlap
    "small": RNG.standard_normal((2, 3)).astype(np.float16),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 5), np.float32),
    "ünicode\n": np.ones(3, np.uint8),
}
NAMES = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}


def by_hand(arrays: Arrays) -> str:
    hashed = b""
    for name in sorted(arrays):
        array = arrays[name]
        raw = array.tobytes()
        shape = ",".join(str(n) for n in array.shape)
        hashed += f'[{json.dumps(name)},"{NAMES[array.dtype.name]}",[{shape}]]\n'.encode("ascii")
        hashed += raw[:4096] + raw[-4096:]
    return "xxh3-128:" + xxhash.xxh3_128(hashed).hexdigest()


def of(path: Path) -> str:
    return fingerprint(Checkpoint.open(path))


def test_definition(tmp_path: Path) -> None:
    assert of(write_file(tmp_path / "x.safetensors", ARRAYS)) == by_hand(ARRAYS)


def test_of_nothing(tmp_path: Path) -> None:
    assert of(write_file(tmp_path / "x.safetensors", {})) == "xxh3-128:" + xxhash.xxh3_128(b"").hexdigest()


def test_golden(tmp_path: Path) -> None:
    """Old files hold fingerprints: a change of the definition would orphan them."""
    arrays: Arrays = {"b": np.arange(3, dtype=np.float32), "a": np.array(1, np.int64)}
    hashed = (
        b'["a","I64",[]]\n'
        + 2 * struct.pack("<q", 1)
        + b'["b","F32",[3]]\n'
        + 2 * struct.pack("<3f", 0, 1, 2)
    )
    assert xxhash.xxh3_128(hashed).hexdigest() == "a0dfeb289499bbf73fbae16513e12752"
    assert of(write_file(tmp_path / "x.safetensors", arrays)) == "xxh3-128:a0dfeb289499bbf73fbae16513e12752"


def test_shards_metadata_order_and_names_of_files_do_not_count(tmp_path: Path) -> None:
    expected = by_hand(ARRAYS)
    assert of(write_file(tmp_path / "x.safetensors", ARRAYS, {"format": "pt"})) == expected
    assert of(write_file(tmp_path / "y.safetensors", dict(reversed(ARRAYS.items())))) == expected
    assert of(write_folder(tmp_path / "one", ARRAYS)) == expected
    assert of(write_folder(tmp_path / "three", ARRAYS, shards=3, config={"a": 1})) == expected


def with_element(name: str, at: int) -> Arrays:
    array = ARRAYS[name].copy()
    array.reshape(-1)[at] += 1
    return ARRAYS | {name: array}


NOTICED: dict[str, Arrays] = {
    "a name": {("Large" if n == "large" else n): a for n, a in ARRAYS.items()},
    "a shape": ARRAYS | {"large": ARRAYS["large"].reshape(40, 300)},
    "a dtype": ARRAYS | {"less": ARRAYS["less"].view(np.int64)},
    "a tensor more": ARRAYS | {"new": np.zeros((0,), np.float32)},
    "a tensor less": {n: a for n, a in ARRAYS.items() if n != "scalar"},
    "the first element": with_element("large", 0),
    "the last of the first bytes": with_element("large", 1023),
    "the first of the last bytes": with_element("large", 12000 - 1024),
    "the last element": with_element("large", -1),
    "a scalar": with_element("scalar", 0),
    "a small tensor": with_element("small", 4),
    "the middle of a tensor of less than two parts": with_element("less", 750),
}


@pytest.mark.parametrize("what", NOTICED)
def test_noticed(tmp_path: Path, what: str) -> None:
    assert of(write_file(tmp_path / "x.safetensors", NOTICED[what])) != by_hand(ARRAYS)


@pytest.mark.parametrize("at", [1024, 5000, 12000 - 1025])
def test_the_middle_of_a_large_tensor_is_not_read(tmp_path: Path, at: int) -> None:
    checkpoint = Checkpoint.open(write_file(tmp_path / "x.safetensors", with_element("large", at)))
    assert fingerprint(checkpoint) == by_hand(ARRAYS)
    assert checkpoint.bytes_read == sum(min(2 * 4096, a.nbytes) for a in ARRAYS.values())


INFO = TensorInfo("w", "F32", (3, 4))
ONE, OTHER = (Provenance({"fingerprint": f"xxh3-128:{digit * 32}"}) for digit in "01")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    folder = write_folder(tmp_path / "base", {"w": np.ones((3, 4), np.float32)})
    return Checkpoint.read(Source(folder, str(folder)))


def test_provenance_of_a_folder_and_of_a_hub_repository(checkpoint: Checkpoint) -> None:
    mark = fingerprint(checkpoint)
    assert Provenance.of(checkpoint).to_json() == {"name": "base", "fingerprint": mark}
    cached = Checkpoint.read(Source(checkpoint.root, "org/name", "org/name", "abc"))
    found = Provenance.of(cached)
    assert list(found.items()) == [
        ("name", "org/name"), ("repo", "org/name"), ("revision", "abc"), ("fingerprint", mark)
    ]  # fmt: skip
    assert (found.name, found.repo, found.revision, found.fingerprint) == tuple(found.values())


@pytest.mark.parametrize(
    ("recorded", "label"),
    [
        ({"repo": "org/name", "name": "n"}, "org/name"),
        ({"repo": "", "name": "n"}, "n"),
        ({"repo": {"a": 1}, "name": "n"}, "n"),
        ({"repo": None, "name": ["n"]}, None),
        ({}, None),
        ("org/name", None),
    ],
)
def test_what_a_checkpoint_is_called(recorded: object, label: str | None) -> None:
    assert Provenance.from_json(recorded).label == label


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (ONE, ONE, True),
        (ONE, OTHER, False),
        (ONE, Provenance({"fingerprint": None}), None),
        (Provenance({}), ONE, None),
        (Provenance({}), Provenance({}), None),
        (ONE, Provenance({"fingerprint": 7}), False),
    ],
)
def test_the_same_files_or_not_or_unknown(one: Provenance, other: Provenance, same: bool | None) -> None:
    assert same_files(one, other) is same
    if same is not False:
        require_same_files("not the same", one, other)
        return
    with pytest.raises(ns.MismatchError, match="not the same") as caught:
        require_same_files("not the same", one, other, file="f", hint="mend it")
    assert caught.value.expected == f"fingerprint {one.fingerprint}"
    assert (caught.value.found, caught.value.file, caught.value.hint) == (
        other["fingerprint"],
        "f",
        "mend it",
    )


@pytest.mark.parametrize(
    ("info", "found"),
    [
        (TensorInfo("w", "F32", (4, 3)), "F32 [3, 4]"),
        (TensorInfo("w", "I32", (3, 4)), "F32 [3, 4]"),
        (TensorInfo("v", "F32", (3, 4)), "no such tensor"),
    ],
)
def test_a_tensor_that_does_not_fit(checkpoint: Checkpoint, info: TensorInfo, found: str) -> None:
    assert not same_tensor(info, checkpoint.tensors.get(info.name))
    with pytest.raises(ns.MismatchError, match="the thing is not for this checkpoint") as caught:
        require_tensors(checkpoint, [INFO, info], "the thing", Provenance({"name": "other"}))
    error = caught.value
    assert (error.file, error.tensor, error.expected, error.found) == (
        checkpoint.name, info.name, info.describe(), found
    )  # fmt: skip
    assert error.hint == "it was made from other"


def test_tensors_that_fit(checkpoint: Checkpoint) -> None:
    assert same_tensor(INFO, checkpoint.tensors["w"])
    assert not same_tensor(None, None)
    require_tensors(checkpoint, [INFO], "the thing")
