"""The tasks of fine-tuning: their examples, and what is measured besides losses."""

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
    """A task."""

    # Its examples.
    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]
    # What tells its results from those of other tasks, as JSON values.
    setting: dict[str, Any] = field(default_factory=dict)
    more: Callable[[Any], dict[str, Any]] = lambda model: {}  # measures more than losses of a tuned model


def task(name: str, folder: Path, text: Text, codec: Codec, sizes: Scale) -> Task:
    """The task called ``name``. Raises TextError."""
    return dict(zip(TASKS, (_translation, _plays), strict=True))[name](folder, text, codec, sizes)


def _translation(folder: Path, text: Text, codec: Codec, sizes: Scale) -> Task:
    """Translation from English into Chinese, which the base knows a little."""
    train, dev, test = (codec.forward(part) for part in (text.train, text.dev, text.test))
    return Task(
        train, dev, test, more=partial(quality.translation, codec=codec, pairs=text.test, sizes=sizes)
    )


def _plays(folder: Path, text: Text, codec: Codec, sizes: Scale) -> Task:
    """English of four centuries ago, which the base has never seen: pieces of long speeches.

    The split goes speech by speech: only the two speeches at its boundaries can be in two parts.
    """
    speeches = read_plays(folder)
    order = random.Random(0).sample(speeches, len(speeches))
    pieces = codec.pieces(order, sizes.piece)
    counts = (sizes.text.test, sizes.text.dev, sizes.text.train)
    if len(pieces) < sum(counts):
        raise TextError(f"{len(pieces)} pieces of plays are too few: {sum(counts)} are needed")
    test, dev, train = (pieces[sum(counts[:n]) : sum(counts[: n + 1])] for n in range(3))
    digest = hashlib.sha256(repr(speeches).encode()).hexdigest()[:16]
    return Task(train, dev, test, {"task": "plays", "plays": digest})
