"""A journal of many changes: the work to check it grows as the journal does, not as its square."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import xxhash
from support import snapshot, write_folder

from neftsurgery.checkpoint.changes import Change
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.healing import plan_heal
from neftsurgery.checkpoint.journal import journaled
from neftsurgery.neurons.layout import Layout
from neftsurgery.sources.resolve import resolve


def interrupted(folder: Path, tensors: int) -> Path:
    """A change of the first row of every tensor, which has not begun to write yet."""
    arrays = {f"layers.{number}.w": np.full((2, 2), number, np.float32) for number in range(tensors)}
    checkpoint = Checkpoint.read(resolve(write_folder(folder, arrays, 1)))
    digest = np.frombuffer(xxhash.xxh3_128_digest(b"new"), np.uint8)
    infos = checkpoint.tensors.values()
    changes = [Change(info, Layout(info.shape, (0,)), np.arange(1), digest[None]) for info in infos]
    with pytest.raises(KeyError), journaled(checkpoint, changes):
        raise KeyError  # the journal stays
    return folder


def calls_to_heal(folder: Path) -> int:
    """How many functions of Python are called for the plan, whatever the time they take."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        plan_heal(folder)
    finally:
        sys.setprofile(None)
    return calls


def test_twice_as_many_tensors_are_twice_the_work(tmp_path: Path) -> None:
    few, many = (interrupted(tmp_path / str(count), count) for count in (100, 400))
    before = snapshot(many)
    assert calls_to_heal(many) < 5 * calls_to_heal(few)
    assert snapshot(many) == before
