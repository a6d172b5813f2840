"""Healing: write back the old vectors of a change in place that was interrupted.

A stranger may have made the journal. So it is followed only if a person asks for it (`plan_heal`), or if this
user's own commands wrote it (`heal_recorded`). Only files of the checkpoint itself are written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import CorruptFileError, MachineError, MismatchError, NeftError, UsageError, boundary, naming
from ..neurons.layout import Layout, described
from ..neurons.vectors import distinct_counts
from ..sources.resolve import Source, is_hub_id, resolve
from ..storage.output import fsync
from ..storage.positioned import consecutive_runs
from ..tensors.header import TensorInfo
from ..text import plural, printable
from .changes import changes_by_tensor
from .checkpoint import Checkpoint, Shard
from .folder_files import put_side, side_digest
from .journal import Journal, describe_file, locked, remove_journal
from .unfinished import find_journals, is_recorded, journal_path, refuse_unfinished

# So many equal bytes are not a coincidence: of random weights, and in sequence if few values are distinct.
_PROOF_BYTES = 16
_PROOF_STRETCH = 64
#: A change keeps a tensor's old vectors once per patch; a journal with more copies was made to fill the disk.
_MOST_COPIES = 16
_RANGES = 20


@dataclass(frozen=True)
class HealResult:
    """What `heal` did."""

    checkpoint: str  # as it was named
    journals: tuple[Path, ...]  # that were followed and removed; none if it was whole
    neurons: int  # how many vectors were written back
    unit: str = "neuron"  # what was counted: ``neuron``, or ``range`` of bytes

    def __str__(self) -> str:
        if not self.journals:
            done = "there is nothing to heal: no change in place was interrupted"
        else:
            done = f"healed: {plural(self.neurons, self.unit)} written back"
        return printable(f"{self.checkpoint}: {done}")


@dataclass(frozen=True)
class HealPlan:
    """Which vectors would be written back. Made by `plan_heal`; nothing is written yet."""

    source: Source
    restorations: tuple[Restoration, ...]  # one per journal, in the order in which they are followed

    @property
    def neurons(self) -> int:
        """How many vectors would be written."""
        return sum(restoration.neurons for restoration in self.restorations)

    def describe(self) -> dict[str, object]:
        """For ``--dry-run`` and JSON: which files, tensors and neurons would be written."""
        return {
            "checkpoint": self.source.named,
            "neurons": self.neurons,
            "journals": [restoration.describe() for restoration in self.restorations],
        }

    def run(self) -> HealResult:
        """Write the old vectors back, sync them, and remove the journals; raises as `heal`."""
        done = [restoration for restoration in self.restorations if restoration.run()]
        return HealResult(
            self.source.named,
            tuple(restoration.journal.path for restoration in done),
            sum(restoration.neurons for restoration in done),
            next((restoration.unit for restoration in done), "neuron"),
        )


@boundary
def heal(checkpoint: str | os.PathLike[str]) -> HealResult:
    """Undo a change in place that was interrupted: the replaced vectors come back, bit for bit.

    Only call this for a checkpoint whose journal you trust: `plan_heal` says what it would write.

    Raises:
        UsageError: If there is no such checkpoint, or a file of it is a symlink or has several hard links.
        CorruptFileError, MismatchError: If the journal is damaged, or belongs to other files.
        MachineError: If another process is changing the checkpoint now, or it cannot be written.
    """
    return plan_heal(checkpoint).run()


@boundary
def plan_heal(checkpoint: str | os.PathLike[str] | Source) -> HealPlan:
    """Read and check the journals of a checkpoint; nothing is written. Raises as `heal`."""
    source = checkpoint if isinstance(checkpoint, Source) else resolve(checkpoint)
    return _plan(source, find_journals(source), {})


def _plan(source: Source, found: Sequence[Source], opened: Mapping[Source, Journal]) -> HealPlan:
    """The plan for the journals of ``found``; those in ``opened`` are not opened again."""
    if found and source.path.is_symlink():
        raise UsageError(
            "cannot heal through a symlink",
            file=source.named,
            expected="the checkpoint itself",
            found=f"a link to {os.path.realpath(source.path)}",
            hint="inspect the target, and name it if you want to heal it",
        )
    restorations = []
    for one in found:
        try:
            restorations.append(Restoration.of(one, opened.get(one) or Journal.open(journal_path(one))))
        except FileNotFoundError:  # another process healed it meanwhile
            continue
    return HealPlan(source, tuple(restorations))


def heal_recorded(checkpoint: str | os.PathLike[str] | Source) -> HealResult | None:
    """Heal what this user's own commands left, if anything; a `MachineError` for another's journal."""
    if isinstance(checkpoint, str | os.PathLike) and is_hub_id(checkpoint):
        return None
    source = checkpoint if isinstance(checkpoint, Source) else resolve(checkpoint)
    opened: dict[Source, Journal] = {}
    for one in find_journals(source):
        try:
            journal = opened[one] = Journal.open(journal_path(one))
        except FileNotFoundError:
            continue
        except CorruptFileError:
            refuse_unfinished(one)
            raise
        if not is_recorded(journal.sha256):
            refuse_unfinished(one)
    result = _plan(source, list(opened), opened).run()  # of the very files whose hash was looked up
    return result if result.journals else None


@dataclass(frozen=True)
class Restoration:
    """The old vectors of one journal, to be written into one checkpoint; everything is checked."""

    checkpoint: Checkpoint
    journal: Journal
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, source: Source, journal: Journal) -> Restoration:
        """Check that a journal belongs to the files of a checkpoint, and that these may be changed."""
        checkpoint = Checkpoint.read(source)
        shards = {shard.name: shard for shard in checkpoint.shards}
        names = [str(entry.get("name")) for entry in journal.files]
        for name in names:
            if name not in shards:
                raise _foreign(journal, name[:200])
        restoration = cls(checkpoint, journal, tuple(shards[name] for name in names))
        restoration._check_tensors()
        with _journal_kept(journal), locked(checkpoint, restoration.shards):
            restoration._check_files()
        return restoration

    @property
    def neurons(self) -> int:
        """How many vectors it would write, each counted once."""
        return sum(self._counts.values())

    @property
    def unit(self) -> str:
        """What its vectors are: neurons, or ranges of bytes."""
        ranges = any(change.is_of_ranges(self.checkpoint) for change in self.journal.changes)
        return "range" if ranges or self.journal.side else "neuron"

    @property
    def _counts(self) -> dict[tuple[TensorInfo, Layout], int]:
        return distinct_counts((one.view, one.layout, one.index) for one in self.journal.changes)

    def describe(self) -> dict[str, Any]:
        """For ``--dry-run`` and JSON."""
        return {
            "journal": str(self.journal.path),
            "sha256": self.journal.sha256,
            "recorded": is_recorded(self.journal.sha256),
            "files": [str(shard.path) for shard in self.shards]
            + [str(self.checkpoint.root / one.name) for one in self.journal.side],
            "bytes": sum(n * of.width * info.type.itemsize for (info, of), n in self._counts.items()),
            "tensors": [
                {
                    "name": change.name,
                    **described(change.view, change.layout.axes),
                    "neurons": len(change.index),
                    "of": change.layout.count,
                    "ranges": [
                        [first, first + stop - start - 1]
                        for start, stop, first in islice(consecutive_runs(change.index), _RANGES)
                    ],
                }
                for change in self.journal.changes
            ],
        }

    def run(self) -> bool:
        """Write the old vectors back; False if another process did so meanwhile."""
        try:
            with _journal_kept(self.journal):
                self._write()
        except FileNotFoundError:
            return False
        return True

    def _write(self) -> None:
        journal = self.journal
        with locked(self.checkpoint, self.shards) as descriptors:
            # Another process may have healed meanwhile, and begun a change of its own.
            journal.check_in_place()
            self._check_files()
            for number, change in enumerate(journal.changes):
                fd = descriptors[self.checkpoint.shard_of(change.name).path]
                for start, stop in change.blocks():
                    change.write(self.checkpoint, fd, start, journal.old(number, start, stop))
            for path, fd in descriptors.items():
                with naming(path):
                    fsync(fd)
            for one in journal.side:
                put_side(self.checkpoint.root / one.name, journal.old_side(one), one.mode)
            # Under the lock: without it, the journal at this path may be that of another change.
            remove_journal(journal.path, journal.sha256)

    def _check_tensors(self) -> None:
        """Every change is about a tensor of these files, and no larger than it can be."""
        paths = {shard.path for shard in self.shards}
        for name, changes in changes_by_tensor(self.journal.changes).items():
            info = self.checkpoint.tensors.get(name)
            if not all(change.is_of(info) for change in changes) or (
                self.checkpoint.shard_of(name).path not in paths
            ):
                raise _foreign(self.journal, next((s.name for s in self.shards), "the checkpoint"))
            if len(changes) > _MOST_COPIES:
                raise CorruptFileError(
                    "a damaged journal: it is larger than the checkpoint", file=self.journal.path, tensor=name
                )

    def _check_files(self) -> None:
        """The files are those the journal was written for, by their description and by their content now."""
        self.journal.check_old()
        by_tensor = changes_by_tensor(self.journal.changes)
        for shard, entry in zip(self.shards, self.journal.files, strict=True):
            if entry != describe_file(self.checkpoint, shard, by_tensor):
                raise _foreign(self.journal, shard.name)
        for one in self.journal.side:
            now = side_digest(self.checkpoint.root / one.name)[0]
            if self.checkpoint.is_file or now not in (one.old, one.new):
                raise _foreign(self.journal, one.name)
        if self.journal.changes and not _is_recognized(self.checkpoint, self.journal):
            raise _foreign(self.journal, self.shards[0].name)


@contextmanager
def _journal_kept(journal: Journal) -> Iterator[None]:
    """Add to an ``OSError`` that nothing is lost."""
    try:
        yield
    except (NeftError, FileNotFoundError):
        raise
    except OSError as error:
        raise MachineError(
            f"healing failed: {(error.strerror or str(error)).lower()}",
            file=error.filename or journal.path,
            hint="the journal is kept: make the checkpoint writable and run neftsurgery heal again",
        ) from error


def _foreign(journal: Journal, name: str) -> MismatchError:
    return MismatchError(
        f"the journal of a change in place was not written for {name}",
        file=journal.path,
        hint="if you have replaced the checkpoint's files since, delete the journal; otherwise restore them",
    )


def _is_recognized(checkpoint: Checkpoint, journal: Journal) -> bool:
    """Whether the vectors there are old ones, new ones, or partly old: there may be nothing to sample."""
    all_known = True
    for number, change in enumerate(journal.changes):
        carrier = change.view.type.carrier
        for start, stop in change.blocks():
            now = change.read(checkpoint, start, stop)
            old = journal.old(number, start, stop)
            known = _known(now, old, change.new_digests[start:stop])
            all_known = all_known and bool(known.all())
            if _is_proof(now.view(carrier), old.view(carrier), known):
                return True
    return all_known


def _known(now: NDArray[np.uint8], old: NDArray[np.uint8], digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which vectors are wholly old or wholly new."""
    known: NDArray[np.bool_] = (now == old).all(axis=1)
    for row in np.flatnonzero(~known):
        known[row] = xxhash.xxh3_128_digest(now[row]) == digests[row].tobytes()
    return known


def _is_proof(now: NDArray[Any], old: NDArray[Any], known: NDArray[np.bool_]) -> bool:
    """Whether elements prove that a block of vectors is the journal's own, perhaps half written.

    Vectors of one repeated element (the zeros of a bias, the ones of a norm) are equal in many models and
    prove nothing. A change that stopped half way along columns leaves no vector whole: then part of one
    vector, or the same element of all vectors, is still old.
    """
    enough = -(-_PROOF_BYTES // now.itemsize)
    if now.shape[1] >= enough:
        if bool((known & (now != now[:, :1]).any(axis=1)).any()):
            return True
    elif 4 * int(known.sum()) >= 3 * len(known) and bool((now[known] != now[known][:1]).any()):
        return True  # single elements: one may be equal by chance, but not most
    same = now == old
    by_chance = int((now.reshape(-1) == np.roll(old, 1).reshape(-1)).sum())
    if int(same.sum()) >= 2 * by_chance + enough:
        return True
    stretch = _PROOF_STRETCH // now.itemsize
    for equal, values in ((same, old), (same.T, old.T)):
        size = equal.size // stretch * stretch
        whole = np.ascontiguousarray(equal).reshape(-1)[:size].reshape(-1, stretch).all(axis=1)
        parts = np.ascontiguousarray(values).reshape(-1)[:size].reshape(-1, stretch)[whole]
        if bool((parts != parts[:, :1]).any()):
            return True
    return False
