"""Changes in place that survive a crash: the old vectors are on disk before the first one is replaced.

The journal is a safetensors file beside the data: per touched tensor the neurons, their old
vectors, and the digests of the new ones. While it exists the change is not complete, and whoever
opens the checkpoint next writes the old vectors back. It names the files it belongs to by size,
header hash and a sample of vectors that the change leaves alone, and is never applied to others.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import MachineError, MismatchError, NeftError
from ..neurons.description import described_tensor
from ..neurons.layout import Layout
from ..neurons.vectors import blocks, check_index, gather, scatter
from ..sources.resolve import Source
from ..storage.output import fsync, fsync_folder
from ..tensors.document import bad, dump, read_document
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile
from ..tensors.writer import written_file
from .checkpoint import Checkpoint, Shard, weight_files

__all__ = ["JOURNAL_NAME", "Change", "heal", "journal_path", "journaled", "locked"]

JOURNAL_NAME = ".neft-journal"
_KEY = "neft_journal"
_VERSION = 1
_WHAT = "journal"
_SAMPLES = 8
# So many equal bytes are no accident: of random weights, and in a row of ones with few distinct values.
_TELLING_BYTES = 16
_TELLING_STRETCH = 64


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """Vectors of one tensor that are about to be replaced.

    Attributes
    ----------
    info, layout:
        The tensor. Several changes may be about the same one, even along different axes.
    index:
        The neurons, ascending, int64 ``[k]``.
    new_digests:
        XXH3-128 of their new vectors, uint8 ``[k, 16]``.
    """

    info: TensorInfo
    layout: Layout
    index: NDArray[np.int64]
    new_digests: NDArray[np.uint8]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Positions in the index, in ranges of bounded size."""
        return blocks(self.info, self.layout, len(self.index))


def journal_path(source: Source) -> Path:
    """Where the journal of a checkpoint lies: inside its folder, or beside its file."""
    path = source.path
    return path / JOURNAL_NAME if path.is_dir() else path.with_name(f".{path.name}.neft-journal")


@contextmanager
def locked(shards: Sequence[Shard]) -> Iterator[dict[Path, int]]:
    """Open weight files for writing, each locked against other processes that change it.

    Yields their descriptors by path.

    Raises
    ------
    MachineError
        If another process holds one.
    """
    held: dict[Path, int] = {}
    try:
        for shard in shards:
            fd = held[shard.path] = os.open(shard.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise MachineError(
                    "another process is changing this checkpoint right now",
                    file=shard.path,
                    hint="wait until it is done, then run the command again",
                ) from error
        yield held
    finally:
        for fd in held.values():
            os.close(fd)


@contextmanager
def journaled(checkpoint: Checkpoint, changes: Sequence[Change]) -> Iterator[None]:
    """Keep the old vectors of ``changes`` on disk for as long as the context lasts.

    The caller holds the lock of all shards (`locked`), and has synced its writes when the
    context ends. If it ends by an exception, the journal stays, and heals at the next `heal`.
    """
    path = journal_path(checkpoint.source)
    touched = {checkpoint.shard_of(change.info.name).path for change in changes}
    by_tensor = _by_tensor(changes)
    files = [_describe(checkpoint, shard, by_tensor) for shard in checkpoint.shards if shard.path in touched]
    tensors: dict[str, dict[str, Any]] = {}
    entries: list[TensorInfo] = []
    for number, change in enumerate(changes):
        info, count = change.info, len(change.index)
        tensors[str(number)] = {
            "name": info.name,
            "shape": list(info.shape),
            "dtype": info.dtype,
            "neuron_axes": list(change.layout.axes),
            "old_hash": "0" * 32,
        }
        entries.append(TensorInfo(f"{number}:index", "I64", (count,)))
        entries.append(TensorInfo(f"{number}:new_digest", "U8", (count, 16)))
        entries.append(TensorInfo(f"{number}:old", info.dtype, (count, change.layout.width)))
    content = {"version": _VERSION, "files": files, "tensors": tensors}
    with written_file(entries, dump(_KEY, content), path) as written:
        for number, change in enumerate(changes):
            written.writer.write(f"{number}:index", 0, change.index)
            written.writer.write(f"{number}:new_digest", 0, change.new_digests)
            old_hash = xxhash.xxh3_128()
            for start, stop in change.blocks():
                old = gather(checkpoint, change.info, change.layout, change.index[start:stop])
                written.writer.write(f"{number}:old", start, old)
                old_hash.update(old.data)
            tensors[str(number)]["old_hash"] = old_hash.hexdigest()
        written.writer.finish(dump(_KEY, content))
    yield
    _remove(path)


def heal(source: Source) -> bool:
    """Undo a change in place that was cut short, if there is one; True if there was.

    Raises
    ------
    MismatchError
        If the journal there belongs to other files.
    MachineError
        If another process is changing the checkpoint now, or it cannot be written.
    """
    if source.repo is not None:
        return False
    return sum(_heal(place) for place in _journaled(source)) > 0


def _journaled(source: Source) -> list[Source]:
    """As what a checkpoint's files were changed: a folder's also one by one, a file also with its folder."""
    path = source.path
    if path.is_symlink():  # the journal lies beside the file itself
        path = Path(os.path.realpath(path))
    places = [Source(path, source.named)]
    if path.is_dir():
        for journal in sorted(path.glob(f".*{JOURNAL_NAME}")):
            file = path / journal.name[1 : -len(JOURNAL_NAME)]
            if _belongs(file, path):
                places.append(Source(file, str(file)))
    elif (path.parent / JOURNAL_NAME).exists() and _belongs(path, path.parent):
        places.append(Source(path.parent, str(path.parent)))
    return [place for place in places if journal_path(place).exists()]


def _belongs(file: Path, folder: Path) -> bool:
    try:
        return file in weight_files(folder)
    except NeftError:
        return False


def _heal(source: Source) -> bool:
    path = journal_path(source)
    try:
        with TensorFile.open(path) as journal:
            _undo(source, journal, path)
    except FileNotFoundError:  # another process healed it meanwhile
        return False
    except MachineError:
        raise
    except OSError as error:
        raise MachineError(
            f"healing a change in place that was cut short failed: {(error.strerror or str(error)).lower()}",
            file=path,
            hint="the journal is kept: make the checkpoint writable and run any command on it again",
        ) from error
    return True


def _undo(source: Source, journal: TensorFile, path: Path) -> None:
    content = read_document(journal, _KEY, _WHAT, _VERSION)
    files = content.get("files")
    if not isinstance(files, list) or not all(isinstance(entry, dict) for entry in files):
        raise bad(journal, _WHAT, "it does not name its files")
    if len({str(entry.get("name")) for entry in files}) != len(files):
        raise bad(journal, _WHAT, "it names a file twice")
    if list(content["tensors"]) != [str(number) for number in range(len(content["tensors"]))]:
        raise bad(journal, _WHAT, "its changes are not numbered in order")
    changes = [_read_change(journal, number, entry) for number, entry in content["tensors"].items()]
    checkpoint = Checkpoint.read(source)
    shards = []
    for entry in files:
        shard = next((s for s in checkpoint.shards if s.path.name == entry.get("name")), None)
        if shard is None:
            raise _foreign(journal, str(entry.get("name"))[:200])
        shards.append(shard)
    with locked(checkpoint.shards) as held:
        # Before the lock was ours, another process may have healed, and begun a change of its own.
        journal.check_in_place()
        for change in changes:
            found = checkpoint.tensors.get(change.info.name)
            if found != change.info or checkpoint.shard_of(found.name).path not in held:
                raise _foreign(journal, shards[0].path.name if shards else "the checkpoint")
        by_tensor = _by_tensor(changes)
        for shard, entry in zip(shards, files, strict=True):
            if entry != _describe(checkpoint, shard, by_tensor):
                raise _foreign(journal, shard.path.name)
        if changes and not _any_known(checkpoint, journal, changes):
            raise _foreign(journal, shards[0].path.name)
        for number, change in enumerate(changes):
            shard = checkpoint.shard_of(change.info.name)
            fd, offset = held[shard.path], shard.header.offsets[change.info.name]
            for start, stop in change.blocks():
                old = journal.array_bytes(f"{number}:old", start, stop)
                index = change.index[start:stop]
                scatter(fd, offset, change.info, change.layout, index, old, str(shard.path))
        for fd in held.values():
            fsync(fd)
        _remove(path)  # while the lock is held: a later journal at the same path is another's


def _read_change(journal: TensorFile, number: str, entry: Any) -> Change:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise bad(journal, _WHAT, f"its change {number[:20]} names no tensor")
    info, layout = described_tensor(journal, _WHAT, name, entry)
    index = journal.tensors.get(f"{number}:index")
    count = index.shape[0] if index is not None and len(index.shape) == 1 else -1
    expected = {
        "index": ("I64", (count,)),
        "new_digest": ("U8", (count, 16)),
        "old": (info.dtype, (count, layout.width)),
    }
    for part, shape in expected.items():
        found = journal.tensors.get(f"{number}:{part}")
        if found is None or (found.dtype, found.shape) != shape:
            raise bad(journal, _WHAT, f"its entry {part} is missing or does not fit", name)
    old_hash = xxhash.xxh3_128()
    for start, stop in blocks(info, layout, count):
        old_hash.update(journal.array_bytes(f"{number}:old", start, stop).data)
    if entry.get("old_hash") != old_hash.hexdigest():
        raise bad(journal, _WHAT, "its old vectors do not match their hash", name)
    values = journal.array(f"{number}:index")
    if why := check_index(values, layout.count):
        raise bad(journal, _WHAT, why, name)
    return Change(info, layout, values, journal.array(f"{number}:new_digest"))


def _any_known(checkpoint: Checkpoint, journal: TensorFile, changes: Sequence[Change]) -> bool:
    """Whether what lies there now is the old, the new, or something in between.

    Where a change touches every vector there is nothing to sample, so this is the last guard.
    """
    all_known = True
    for number, change in enumerate(changes):
        carrier = change.info.type.carrier
        for start, stop in change.blocks():
            now = gather(checkpoint, change.info, change.layout, change.index[start:stop])
            old = journal.array_bytes(f"{number}:old", start, stop)
            known = _known(now, old, change.new_digests[start:stop])
            all_known = all_known and bool(known.all())
            if _telling(now.view(carrier), old.view(carrier), known):
                return True
    return all_known


def _known(now: NDArray[np.uint8], old: NDArray[np.uint8], digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which vectors are the old or the new ones, whole."""
    known: NDArray[np.bool_] = (now == old).all(axis=1)
    for row in np.flatnonzero(~known):
        known[row] = xxhash.xxh3_128_digest(now[row]) == digests[row].tobytes()
    return known


def _telling(now: NDArray[Any], old: NDArray[Any], known: NDArray[np.bool_]) -> bool:
    """Whether elements show that a block of vectors is the journal's own, perhaps half written.

    Vectors of one repeated element (the zeros of a bias, the ones of a norm) are alike in many
    models and tell nothing. A change that stopped half way along columns leaves no vector whole: then
    a stretch of one vector, or the same element of all vectors, is still old.
    """
    enough = -(-_TELLING_BYTES // now.itemsize)
    if now.shape[1] >= enough:
        if bool((known & (now != now[:, :1]).any(axis=1)).any()):
            return True
    elif 4 * int(known.sum()) >= 3 * len(known) and bool((now[known] != now[known][:1]).any()):
        return True  # elements on their own: one may be alike by accident, but not most
    same = now == old
    by_chance = int((now.reshape(-1) == np.roll(old, 1).reshape(-1)).sum())
    if int(same.sum()) >= 2 * by_chance + enough:
        return True
    stretch = _TELLING_STRETCH // now.itemsize
    for equal, values in ((same, old), (same.T, old.T)):
        size = equal.size // stretch * stretch
        whole = np.ascontiguousarray(equal).reshape(-1)[:size].reshape(-1, stretch).all(axis=1)
        parts = np.ascontiguousarray(values).reshape(-1)[:size].reshape(-1, stretch)[whole]
        if bool((parts != parts[:, :1]).any()):
            return True
    return False


def _by_tensor(changes: Sequence[Change]) -> dict[str, list[Change]]:
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.info.name, []).append(change)
    return found


def _describe(
    checkpoint: Checkpoint, shard: Shard, changes: Mapping[str, Sequence[Change]]
) -> dict[str, Any]:
    """What tells a weight file from others, whatever the state of the change."""
    header = bytearray(shard.header.size)
    with open(shard.path, "rb") as file:
        file.readinto(header)
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
            layout, size = mine[0].layout, info.type.itemsize
            edge = min(4096, layout.width * size)
            spread = np.unique(np.linspace(0, layout.count - 1, 8 * _SAMPLES).astype(np.int64))
            kept = np.setdiff1d(spread, mine[0].index)[:_SAMPLES]
            starts = [int(neuron) * layout.width * size for neuron in kept]
        else:
            continue  # where changes cross, or run along columns, no cheap range is sure to stay
        for start in starts:
            buffer = bytearray(edge)
            checkpoint.read_into(name, start, memoryview(buffer))
            sample.update(buffer)
    return {
        "name": shard.path.name,
        "size": shard.size,
        "header": xxhash.xxh3_128_hexdigest(header),
        "sample": sample.hexdigest(),
    }


def _foreign(journal: TensorFile, name: str) -> MismatchError:
    return MismatchError(
        f"a journal of a change in place lies here, but {name} is not the file it was written for",
        file=journal.path,
        hint="if you replaced the checkpoint's files since, delete the journal; otherwise restore them",
    )


def _remove(path: Path) -> None:
    os.unlink(path)
    fsync_folder(path.parent)
