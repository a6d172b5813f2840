"""The same base, and does it fit: provenance, and the checks that use it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import write_folder

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.fingerprint import fingerprint
from neftsurgery.checkpoint.fit import require_same_files, require_tensors, same_files, same_tensor
from neftsurgery.checkpoint.provenance import Provenance
from neftsurgery.sources.resolve import Source
from neftsurgery.tensors.header import TensorInfo

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
