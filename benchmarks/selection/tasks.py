"""What the base is tuned to do: examples to learn from and to examine on, and what is measured of it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.selection import quality
from benchmarks.selection.examples import Codec, Example
from benchmarks.selection.options import TASKS, Scale
from benchmarks.selection.text import Text, TextError, read_plays


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes
    ----------
    train, dev, test:
        Its examples.
    setting:
        What sets its results file apart from those of other tasks; JSON.
    more:
        What is measured of a tuned model beside losses.
    """

    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]
    setting: dict[str, Any] = field(default_factory=dict)
    more: Callable[[Any], dict[str, Any]] = lambda model: {}


def task(name: str, folder: Path, text: Text, codec: Codec, sizes: Scale) -> Task:
    """The task of a name. Raises TextError."""
    return dict(zip(TASKS, (_translation, _plays), strict=True))[name](folder, text, codec, sizes)


def _translation(folder: Path, text: Text, codec: Codec, sizes: Scale) -> Task:
    """English into Chinese, of which the base knows a little."""
    train, dev, test = (codec.forward(part) for part in (text.train, text.dev, text.test))
    return Task(
        train, dev, test, more=partial(quality.translation, codec=codec, pairs=text.test, sizes=sizes)
    )


def _plays(folder: Path, text: Text, codec: Codec, sizes: Scale) -> Task:
    """English of four centuries ago, of which the base knows nothing: pieces of long speeches.

    They are dealt out speech by speech, so that but for the two at the seams a speech is in one part.
    """
    speeches = read_plays(folder)
    order = random.Random(0).sample(speeches, len(speeches))
    pieces = codec.pieces(order, sizes.piece)
    counts = (sizes.text.test, sizes.text.dev, sizes.text.train)
    if len(pieces) < sum(counts):
        raise TextError(f"{len(pieces)} pieces of plays are too few: {sum(counts)} are asked for")
    test, dev, train = (pieces[sum(counts[:n]) : sum(counts[: n + 1])] for n in range(3))
    digest = hashlib.sha256(repr(speeches).encode()).hexdigest()[:16]
    return Task(train, dev, test, {"task": "plays", "plays": digest})
