"""The folder with the checkpoints that are measured, and the outputs of commands."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import page_cache
from benchmarks.harness.log import log
from benchmarks.harness.process import run
from benchmarks.harness.sizes import format_size

MARGIN = 2_000_000_000  # bytes of the disk that stay free


class DiskSpaceError(Exception):
    """The disk cannot hold what a part needs."""


@dataclass(frozen=True)
class CheckpointPair:
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
        return page_cache.total_size([self.folder])

    def warm(self) -> None:
        page_cache.warm(self.folder)

    def drop(self) -> None:
        page_cache.drop(self.folder)


class Fixtures:
    """Writes pairs on demand, keeps them while the disk has room, and names paths for outputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pair(self, nbytes: int, *words: object, outputs: int = 0) -> CheckpointPair:
        """The pair of this size and kind (see ``python -m benchmarks.checkpoints --help``).

        Raises:
            DiskSpaceError: The disk cannot hold the pair and ``outputs`` bytes more.
        """
        name = "-".join(["pair", str(nbytes), *(str(word).strip("-") for word in words)])
        pair = CheckpointPair(self.folder / name)
        if not pair.folder.exists():
            self._make_room(outputs if "--sparse" in words else 2 * nbytes + outputs)
            log(f"  writing a pair of {format_size(nbytes)} {' '.join(map(str, words))}")
            run(_maker(pair.folder, nbytes, words))
        return pair

    def output(self, name: str) -> Path:
        """The path of an output. Removes what is there."""
        path = self.folder / name
        self.remove(name)
        return path

    def remove(self, name: str) -> None:
        """Removes an output, if there is one."""
        path = self.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        """Removes pairs, the oldest first, until there is room."""
        old = sorted(self.folder.glob("pair-*"), key=lambda folder: folder.stat().st_mtime)
        while (free := page_cache.free_space(self.folder)) < needed + MARGIN:
            if not old:
                raise DiskSpaceError(f"needs {format_size(needed)} of disk; {format_size(free)} are free")
            shutil.rmtree(old.pop(0))


def _maker(folder: Path, nbytes: int, words: Sequence[object]) -> list[str]:
    return [
        sys.executable,
        *("-m", "benchmarks.checkpoints", str(folder), "--size", str(nbytes)),
        *map(str, words),
    ]
