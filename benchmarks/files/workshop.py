"""The folder in which checkpoints are made and outputs come and go."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import pages
from benchmarks.harness.contest import say
from benchmarks.harness.process import run
from benchmarks.harness.units import human

MARGIN = 2_000_000_000  # bytes of the disk that are left alone


class NoRoomError(Exception):
    """The disk cannot hold what a part needs."""


@dataclass(frozen=True)
class Pair:
    """A base and a fine-tune of it."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def tuned(self) -> Path:
        return self.folder / "tuned"

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return pages.total_size([self.folder])

    def warm(self) -> None:
        pages.warm(self.folder)

    def drop(self) -> None:
        pages.drop(self.folder)


class Workshop:
    """Makes pairs when asked for, keeps them while the disk has room, and names places for outputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pair(self, nbytes: int, *words: object, outputs: int = 0) -> Pair:
        """The pair of this size and kind (see ``python -m benchmarks.checkpoints --help``).

        Raises:
            NoRoomError: The disk does not hold it together with ``outputs`` bytes.
        """
        name = "-".join(["pair", str(nbytes), *(str(word).strip("-") for word in words)])
        pair = Pair(self.folder / name)
        if not pair.folder.exists():
            self._make_room(outputs if "--sparse" in words else 2 * nbytes + outputs)
            say(f"  making a pair of {human(nbytes)} {' '.join(map(str, words))}")
            run(_maker(pair.folder, nbytes, words))
        return pair

    def place(self, name: str) -> Path:
        """Where an output goes; what was there is gone."""
        path = self.folder / name
        self.clear(name)
        return path

    def clear(self, name: str) -> None:
        """Removes an output, if it is there."""
        path = self.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        """Other pairs go, the oldest first, until there is room."""
        old = sorted(self.folder.glob("pair-*"), key=lambda folder: folder.stat().st_mtime)
        while (free := pages.free_space(self.folder)) < needed + MARGIN:
            if not old:
                raise NoRoomError(f"needs {human(needed)} of disk, and {human(free)} are free")
            shutil.rmtree(old.pop(0))


def _maker(folder: Path, nbytes: int, words: Sequence[object]) -> list[str]:
    return [
        sys.executable,
        *("-m", "benchmarks.checkpoints", str(folder), "--size", str(nbytes)),
        *map(str, words),
    ]
