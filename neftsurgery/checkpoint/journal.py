"""Changes in place that survive a crash: the old vectors are on disk before the first one is replaced.

The journal is a safetensors file beside the weights. For each touched tensor it holds the neurons, their old
vectors, and the digests of the new ones. While it exists the change is not complete (see `unfinished`), and
`healing` writes the old vectors back. It identifies its weight files by size, header hash and a sample of
vectors that the change leaves alone, and is never applied to others.

Version 2 is written for changes that version 1 cannot say: the vectors of a tensor may be its bytes in ranges
of equal size (dtype U8, shape ``[ranges, size]``; the last range is filled up with zeros), and files beside
the weights may change (``side``: name, XXH3-128 before and after, permission bits; null for no file).
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import CorruptFileError, MachineError, UsageError, naming
from ..neurons.layout import Layout, described, described_tensor
from ..neurons.vectors import check_index
from ..storage.output import fsync_folder
from ..storage.positioned import changed_file, open_to_change
from ..tensors.document import bad, dump, read_document, require_entry
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile
from ..tensors.writer import written_file
from .changes import Change, changes_by_tensor
from .checkpoint import Checkpoint, Shard
from .folder_files import SideChange, is_side, read_side
from .unfinished import forget, journal_path, record

_KEY = "neft_journal"
_VERSION = 2
_WHAT = "journal"
_SAMPLES = 8


@contextmanager
def locked(checkpoint: Checkpoint, shards: Sequence[Shard]) -> Iterator[dict[Path, int]]:
    """Open weight files for writing, locked against other processes, which may raise a `MachineError`."""
    descriptors: dict[Path, int] = {}
    try:
        for shard in shards:
            fd = descriptors[shard.path] = _open_shard(checkpoint, shard)
            try:
                with naming(shard.path):
                    status = os.fstat(fd)
                    if not os.path.samestat(status, shard.status):
                        raise changed_file(shard.path)
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _busy(shard.path) from error
        yield descriptors
    finally:
        for fd in descriptors.values():
            os.close(fd)


def _open_shard(checkpoint: Checkpoint, shard: Shard) -> int:
    if checkpoint.source.index is not None:
        raise UsageError(
            "what an index names cannot be changed in place: a reader of the folder may take other files",
            file=checkpoint.name,
            hint="name its folder, or write a new checkpoint with [[out=...]]",
        )
    return open_to_change(shard.path, below=checkpoint.root if checkpoint.is_file else checkpoint.root.parent)


def require_writable(checkpoint: Checkpoint, shards: Sequence[Shard]) -> None:
    """Raise as `open_to_change` unless weight files can be written."""
    for shard in shards:
        os.close(_open_shard(checkpoint, shard))


def _busy(path: Path) -> MachineError:
    return MachineError(
        "another process is changing this checkpoint",
        file=path,
        hint="wait until it has finished, then run the command again",
    )


def touched_shards(checkpoint: Checkpoint, changes: Sequence[Change]) -> list[Shard]:
    """The weight files of changes; the first one, for its lock, if only files beside them change."""
    paths = {checkpoint.shard_of(change.name).path for change in changes}
    return [shard for shard in checkpoint.shards if shard.path in paths] or [*checkpoint.shards[:1]]


@contextmanager
def journaled(
    checkpoint: Checkpoint, changes: Sequence[Change], side: Sequence[SideChange] = ()
) -> Iterator[None]:
    """Keep what is replaced on disk while the context lasts, and longer after an exception.

    The caller holds the lock of all shards it touches (`locked`), and has synced its writes when the context
    ends. A `MachineError` says that the journal or its `record` cannot be written; then no weight was.
    """
    path = journal_path(checkpoint.source)
    by_tensor = changes_by_tensor(changes)
    files = [describe_file(checkpoint, shard, by_tensor) for shard in touched_shards(checkpoint, changes)]
    tensors: dict[str, dict[str, object]] = {
        str(number): {"name": one.name, **described(one.view, one.layout.axes), "old_hash": "0" * 32}
        for number, one in enumerate(changes)
    }
    entries = [
        entry
        for number, one in enumerate(changes)
        for entry in _entries(number, one.view, one.layout, len(one.index))
    ]
    # The id makes every journal unique, so that a record never stands for another change.
    content = {"version": 1, "id": secrets.token_hex(8), "files": files, "tensors": tensors}
    if side or any(change.is_of_ranges(checkpoint) for change in changes):
        facts = [{"name": one.name, "old": one.old, "new": one.new, "mode": one.mode} for one in side]
        content |= {"version": _VERSION, "side": facts}
    replaced = [one for one in side if one.old is not None]
    sizes = ((checkpoint.root / one.name).stat().st_size for one in replaced)
    entries += [TensorInfo(f"side:{one.name}", "U8", (n,)) for one, n in zip(replaced, sizes, strict=True)]
    sha256 = ""
    try:
        with written_file(entries, dump(_KEY, content), path) as written:
            for number, change in enumerate(changes):
                written.write(f"{number}:index", 0, change.index)
                written.write(f"{number}:new_digest", 0, change.new_digests)
                old_hash = xxhash.xxh3_128()
                for start, stop in change.blocks():
                    old = change.read(checkpoint, start, stop)
                    written.write(f"{number}:old", start, old)
                    old_hash.update(old.data)
                tensors[str(number)]["old_hash"] = old_hash.hexdigest()
            for one in replaced:
                raw = read_side(checkpoint.root / one.name)
                if xxhash.xxh3_128_hexdigest(raw) != one.old:
                    raise changed_file(checkpoint.root / one.name)
                written.write(f"side:{one.name}", 0, np.frombuffer(raw, np.uint8))
            written.finish(dump(_KEY, content))
            sha256 = written.sha256()
            record(sha256, path)
    except BaseException as error:
        taken = isinstance(error, UsageError)  # the journal of another process is there
        if sha256 and (taken or _is_gone(path)):
            forget(sha256)
        if taken:
            raise _busy(path) from error
        raise
    yield
    remove_journal(path, sha256)


def _entries(number: int | str, view: TensorInfo, layout: Layout, count: int) -> list[TensorInfo]:
    """The entries of a change in the file."""
    return [
        TensorInfo(f"{number}:index", "I64", (count,)),
        TensorInfo(f"{number}:new_digest", "U8", (count, 16)),
        TensorInfo(f"{number}:old", view.dtype, (count, layout.width)),
    ]


def _is_gone(path: Path) -> bool:
    try:
        path.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)  # on a share that is gone, it may still be there
    return False


def remove_journal(path: Path, sha256: str) -> None:
    """Remove a journal whose change is complete or undone, and then its record."""
    os.unlink(path)
    fsync_folder(path.parent)
    forget(sha256)


class Journal:
    """A journal opened for reading. The old vectors of its ``changes`` are checked by `check_old`."""

    def __init__(self, path: Path, file: TensorFile) -> None:
        content = read_document(file, _KEY, _WHAT, _VERSION)
        files = content.get("files")
        if not isinstance(files, list) or not all(isinstance(entry, dict) for entry in files):
            raise bad(file, _WHAT, "it does not name its files")
        if len({str(entry.get("name")) for entry in files}) != len(files):
            raise bad(file, _WHAT, "it names a file twice")
        if list(content["tensors"]) != [str(number) for number in range(len(content["tensors"]))]:
            raise bad(file, _WHAT, "its changes are not numbered in order")
        self.path = path
        self.files: Sequence[Mapping[str, Any]] = files
        self.changes = [_read_change(file, n, entry) for n, entry in content["tensors"].items()]
        side = content.get("side", [])
        self.side = [_read_side(file, entry) for entry in (side if isinstance(side, list) else [side])]
        if len({one.name for one in self.side}) != len(self.side):
            raise bad(file, _WHAT, "it names a file twice")
        self._file = file
        self._old_hashes = [entry.get("old_hash") for entry in content["tensors"].values()]

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open a journal, not through a symlink; a ``FileNotFoundError`` if there is none."""
        file = TensorFile.open(path) if stat.S_ISREG(path.lstat().st_mode) else None
        if file is None or path.is_symlink():  # it may have become one meanwhile
            raise CorruptFileError("a damaged journal: not a regular file", file=path)
        return cls(path, file)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the whole file, in hex."""
        return self._file.sha256()

    def old(self, number: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Old vectors ``[start, stop)`` of a change, as raw bytes."""
        return self._file.array_bytes(f"{number}:old", start, stop)

    def old_side(self, one: SideChange) -> bytes | None:
        """What a file beside the weights held before; raises a `CorruptFileError` if it is damaged."""
        if one.old is None:
            return None
        content = self._file.array_bytes(f"side:{one.name}").tobytes()
        if xxhash.xxh3_128_hexdigest(content) != one.old:
            raise bad(self._file, _WHAT, f"the old {one.name} does not match its hash")
        return content

    def check_old(self) -> None:
        """Raise a `CorruptFileError` unless what is old matches its hashes, and each other."""
        for one in self.side:
            self.old_side(one)
        known: dict[str, list[int]] = {}  # changes of each tensor: there may be 100,000 tensors
        for number, change in enumerate(self.changes):
            old_hash = xxhash.xxh3_128()
            for start, stop in change.blocks():
                old_hash.update(self.old(number, start, stop).data)
            if self._old_hashes[number] != old_hash.hexdigest():
                raise bad(self._file, _WHAT, "its old vectors do not match their hash", change.name)
            same = known.setdefault(change.name, [])
            for earlier in same:
                self._check_overlap(earlier, number)
            same.append(number)

    def _check_overlap(self, first: int, second: int) -> None:
        """Two changes of the same neurons must hold the same old vectors."""
        a, b = self.changes[first], self.changes[second]
        if (a.view, a.layout) != (b.view, b.layout):
            return
        _, mine, theirs = np.intersect1d(a.index, b.index, assume_unique=True, return_indices=True)
        for i, j in zip(mine.tolist(), theirs.tolist(), strict=True):
            if not np.array_equal(self.old(first, i, i + 1), self.old(second, j, j + 1)):
                raise bad(self._file, _WHAT, "two of its changes overlap and disagree", a.name)

    def check_in_place(self) -> None:
        """Raise a ``FileNotFoundError`` if the journal was removed or replaced since it was opened."""
        self._file.check_in_place()
        self._file.check_unchanged()


def _read_change(file: TensorFile, number: str, entry: Any) -> Change:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise bad(file, _WHAT, f"its change {number[:20]} names no tensor")
    info, layout = described_tensor(file, _WHAT, name, entry)
    index = file.tensors.get(f"{number}:index")
    count = index.shape[0] if index is not None and len(index.shape) == 1 else -1
    for one in _entries(number, info, layout, count):
        require_entry(file, _WHAT, one)
    if count > layout.count:
        raise bad(file, _WHAT, "it has more neurons than the tensor", name)
    values = file.array(f"{number}:index")
    if why := check_index(values, layout.count):
        raise bad(file, _WHAT, why, name)
    return Change(info, layout, values, file.array(f"{number}:new_digest"))


def _read_side(file: TensorFile, entry: Any) -> SideChange:
    """A file beside the weights that changes, as the journal has it; only files of the fixed list do."""
    facts = entry if isinstance(entry, dict) else {}
    name, mode = facts.get("name"), facts.get("mode")
    old, new = facts.get("old"), facts.get("new")
    if (
        not (isinstance(name, str) and is_side(name))
        or not all(one is None or isinstance(one, str) for one in (old, new))
        or not (mode is None or (type(mode) is int and 0 <= mode <= 0o777))
        or (old is not None and f"side:{name}" not in file.tensors)
    ):
        raise bad(file, _WHAT, "a file beside the weights is not described")
    return SideChange(name, old, new, mode)


def describe_file(
    checkpoint: Checkpoint, shard: Shard, changes: Mapping[str, Sequence[Change]]
) -> dict[str, Any]:
    """What identifies a weight file, whatever the state of the change."""
    sample = xxhash.xxh3_128()
    for name in sorted(shard.header.tensors):
        info = shard.header.tensors[name]
        mine = changes.get(name, ())
        if info.nbytes == 0:
            continue
        if not mine:
            edge = min(4096, info.nbytes)
            starts = [0, info.nbytes - edge]
        elif len(mine) == 1 and mine[0].layout.contiguous:
            layout, size = mine[0].layout, mine[0].view.type.itemsize
            edge = min(4096, layout.width * size)
            spread = np.unique(np.linspace(0, layout.count - 1, 8 * _SAMPLES).astype(np.int64))
            kept = np.setdiff1d(spread, mine[0].index)[:_SAMPLES]
            starts = [int(neuron) * layout.width * size for neuron in kept]
            starts = [start for start in starts if start + edge <= info.nbytes]
        else:
            continue  # where changes cross, or run along columns, no range is cheap and sure to stay as it is
        for start in starts:
            buffer = bytearray(edge)
            checkpoint.read_into(name, start, memoryview(buffer))
            sample.update(buffer)
    return {
        "name": shard.name,
        "size": shard.size,
        "header": xxhash.xxh3_128_hexdigest(shard.raw_header()),
        "sample": sample.hexdigest(),
    }
