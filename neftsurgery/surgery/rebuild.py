"""apply and revert of lossless patches: whole checkpoints, written anew from their difference."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.folder_files import folder_files
from ..checkpoint.provenance import Provenance, fingerprint
from ..checkpoint.weight_files import INDEX_NAME
from ..coding.elements import Carrier
from ..errors import MismatchError, UsageError
from ..patch.delta import Delta, DeltaBlock, SideFile, block_state, counterpart
from ..patch.lossless import LosslessPatch, load_any
from ..patch.patch import PATCH_KEY
from ..progress import Progress, Stopwatch, Timing, silent
from ..storage.copying import copy_file
from ..storage.output import begin_writeback, staged_directory, staged_file
from ..storage.output_checks import AnyPath, refuse_output, require_space
from ..storage.positioned import write_exactly
from ..storage.threads import Limits, in_order
from ..tensors.header import read_header
from ..text import plural

__all__ = ["RebuildPlan", "RebuildResult", "chain_of", "plan_rebuild"]

_BLOCK_MEMORY = 24 << 20


@dataclass(frozen=True)
class RebuildResult:
    """What applying or reverting a lossless patch did.

    Attributes
    ----------
    checkpoint:
        What was written.
    goal:
        The state it is in: ``patched`` or ``base``.
    files:
        The names of its files.
    timing:
        What it took.
    """

    checkpoint: Path
    goal: str
    files: tuple[str, ...]
    timing: Timing = field(default_factory=Timing, repr=False)

    @property
    def written(self) -> bool:
        """Whether anything was written: always."""
        return True

    def __str__(self) -> str:
        what = "the tuned checkpoint" if self.goal == "patched" else "the base"
        return f"{self.checkpoint}: {plural(len(self.files), 'file')}: {what}, bit for bit"


@dataclass(frozen=True)
class RebuildPlan:
    """A checkpoint that is written anew. Made by `plan_rebuild`; nothing is written yet."""

    checkpoint: Checkpoint  # what is read
    patches: tuple[LosslessPatch, ...]
    links: tuple[Delta, ...]  # one after the other; none: the files of `checkpoint` are copied
    goal: str  # ``patched`` or ``base``
    out: Path
    force: bool
    along: tuple[Path, ...]  # files of `checkpoint` that are copied
    timing: Timing
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of what is written, files that are copied along not counted."""
        if not self.links:
            return sum(shard.size for shard in self.checkpoint.shards)
        return self.links[-1].nbytes + sum(one.nbytes for one in self.links[-1].side)

    @property
    def single(self) -> bool:
        """Whether the result is one file."""
        return self.links[-1].single if self.links else self.checkpoint.is_file

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files."""
        if self.links:
            own = [file.name for file in self.links[-1].files] + [one.name for one in self.links[-1].side]
            return (*own, *map(str, self.along))
        return (*(shard.path.name for shard in self.checkpoint.shards), *map(str, self.along))

    @property
    def not_carried(self) -> tuple[str, ...]:
        """Files of the result that no patch holds."""
        return self.patches[-1].not_carried if self.goal == "patched" else ()

    def describe(self) -> dict[str, object]:
        """For ``--dry-run`` and JSON."""
        return {
            "checkpoint": self.checkpoint.name,
            "patches": [patch.name for patch in self.patches],
            "lossless": True,
            "out": str(self.out),
            "in_place": False,
            "tensors": len(self.links[-1].tensors if self.links else self.checkpoint.tensors),
            "files": list(self.names),
            "bytes": self.nbytes,
            "not_carried": list(self.not_carried),
        }

    def run(self, *, limits: Limits | None = None, progress: Progress = silent) -> RebuildResult:
        """Write the checkpoint; every block is checked before and after."""
        limits = limits or Limits.of()
        watch, before = Stopwatch(), self.checkpoint.bytes_read
        with watch.running():
            if not self.links:
                self._check_copied(limits, progress)
            self._write(limits, progress)
        watch.bytes_read = self.checkpoint.bytes_read - before
        return RebuildResult(self.out, self.goal, self.names, self.timing + watch.timing)

    def _check_copied(self, limits: Limits, progress: Progress) -> None:
        """Compare what will be copied with the hashes of the base, as far as the patch has them."""
        delta = self.patches[-1].forward

        def state(block: DeltaBlock) -> int:
            return block_state(self.checkpoint, block)[1]

        with progress("checking", delta.block_bytes) as advance:
            for block, found in in_order(state, delta.blocks, limits.workers(_BLOCK_MEMORY)):
                if found != int(delta.before[block.number]):
                    raise self._another(block)
                advance(block.nbytes)

    def _write(self, limits: Limits, progress: Progress) -> None:
        with progress("writing", self.nbytes) as advance:
            if self.single:
                with staged_file(self.out, force=self.force) as staged:
                    require_space(self.out.absolute().parent, self.nbytes)
                    self._write_weights(0, staged.fd, limits, advance)
                    self._check_unchanged()
            else:
                with staged_directory(self.out, force=self.force) as folder:
                    require_space(self.out.absolute().parent, self.nbytes)
                    self._write_folder(folder, limits, advance)
                    self._check_unchanged()

    def _check_unchanged(self) -> None:
        self.checkpoint.check_unchanged()
        for patch in self.patches:
            patch.check_unchanged()

    def _write_folder(self, folder: Path, limits: Limits, advance: Callable[[int], None]) -> None:
        for one in self.links[-1].side if self.links else ():
            (folder / one.name).write_bytes(self._side_content(one))
            advance(one.nbytes)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        weights = len(self.links[-1].files if self.links else self.checkpoint.shards)
        for number, name in enumerate(self.names[:weights]):
            fd = os.open(folder / name, flags, 0o666)
            try:
                self._write_weights(number, fd, limits, advance)
            finally:
                os.close(fd)
        for path in self.along:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            copy_file(self.checkpoint.root / path, folder / path)

    def _write_weights(self, number: int, fd: int, limits: Limits, advance: Callable[[int], None]) -> None:
        if not self.links:
            copy_file(self.checkpoint.shards[number].path, fd, progress=advance)
            return
        file = self.links[-1].files[number]
        os.ftruncate(fd, file.nbytes)
        write_exactly(fd, file.start, 0)
        advance(file.header.size)

        def write(block: DeltaBlock) -> None:
            found = self._rebuilt(block)
            write_exactly(fd, found.data.cast("B"), block.offset)
            begin_writeback(fd, block.offset, block.nbytes)

        blocks = (block for block in self.links[-1].blocks if block.file is file)
        for block, _ in in_order(write, blocks, limits.workers(_BLOCK_MEMORY)):
            advance(block.nbytes)

    def _rebuilt(self, block: DeltaBlock) -> Carrier:
        """A block of what all links make, from what each makes of it. What is the result's already, stays."""
        ways = [(self.links[-1], block)]
        for delta in reversed(self.links[:-1]):
            info = counterpart(ways[-1][1].info, delta.tensors)
            source = None if info is None else delta.block_at(info.name, block.start)
            if source is None:
                break
            ways.append((delta, source))
        found = self._first_made(*ways.pop()) if len(ways) == len(self.links) else None
        for delta, one in reversed(ways):
            source_elements = None
            if found is not None:
                source_elements = np.zeros(one.stop - one.start, one.elements.carrier)
                there = min(len(found), len(source_elements))
                source_elements[:there] = found[:there]
            found = delta.decoded(one, source_elements)
        assert found is not None
        return found

    def _first_made(self, delta: Delta, block: DeltaBlock) -> Carrier:
        """A block of what the first link makes of the checkpoint."""
        found, state, whole = block_state(self.checkpoint, block)
        if state == int(delta.before[block.number]):
            return delta.decoded(block, found)
        if found is not None and whole and state == int(delta.after[block.number]):
            return found
        raise self._another(block)

    def _another(self, block: DeltaBlock) -> MismatchError:
        return MismatchError(
            f"{self.patches[0].name} was made from another checkpoint",
            file=self.checkpoint.name,
            tensor=block.info.name,
            hint="nothing was written; `neftsurgery verify` shows every tensor's state",
        )

    def _side_content(self, side: SideFile) -> bytes:
        """A file beside the weights: from the last link that holds it, else the checkpoint's own."""

        def source() -> bytes:
            for delta in reversed(self.links[:-1]):
                own = next((one for one in delta.side if one.name == side.name), None)
                if own is None:
                    return b""
                if own.packed:
                    return delta.side_content(own, bytes)
            path = self.checkpoint.root / side.name
            return path.read_bytes() if path.is_file() and path.stat().st_size == side.nbytes else b""

        return self.links[-1].side_content(side, source)


def plan_rebuild(
    named: AnyPath,
    patches: Sequence[LosslessPatch],
    *,
    goal: str,
    base: AnyPath | None = None,
    out: AnyPath | None,
    in_place: bool = False,
    force: bool = False,
) -> RebuildPlan:
    """Check everything that applying or reverting lossless patches needs; nothing is written."""
    last = patches[-1]
    if in_place or out is None:
        raise UsageError(
            "a lossless patch makes a whole checkpoint, and is not applied in place",
            file=last.place,
            hint="write a new checkpoint with [[out=...]]",
        )
    if goal == "base" and base is None and last.backward is None:
        raise UsageError(
            "the patch does not hold the way back",
            file=last.place,
            hint="name the checkpoint it was made from with [[base=...]]; [[reversible=True]] makes patches "
            "that hold the way back",
        )
    watch = Stopwatch()
    with watch.running():
        checkpoint = Checkpoint.open(named)
        inputs = [checkpoint.source.path, *(patch.path for patch in patches if patch.path is not None)]
        along: tuple[Path, ...] = ()
        if goal == "patched":
            links = _links(checkpoint, patches)
            weights_only = any(patch.manifest.get("weights_only") is True for patch in patches)
            if weights_only and not checkpoint.is_file and not links[-1].single:
                own = {file.name for file in links[-1].files} | {INDEX_NAME}
                along = tuple(path for path in folder_files(checkpoint).along if str(path) not in own)
        else:
            _require(last, checkpoint, last.tuned, last.base)
            links = () if last.backward is None else (last.backward,)
            if base is not None:
                checkpoint, links = Checkpoint.open(base), ()
                inputs.append(checkpoint.source.path)
                _require(last, checkpoint, last.base)
                along = () if checkpoint.is_file else folder_files(checkpoint).along
        plan = RebuildPlan(checkpoint, tuple(patches), links, goal, Path(out), force, along, watch.timing)
        refuse_output(out, inputs=inputs, force=force, kind="file" if plan.single else "directory")
    return dataclasses.replace(plan, timing=watch.timing)


def _links(checkpoint: Checkpoint, patches: Sequence[LosslessPatch]) -> tuple[Delta, ...]:
    """The deltas from a checkpoint on: it is the base of one of the patches, or what the last one makes."""
    for earlier, later in pairwise(patches):
        if later.base.fingerprint != earlier.tuned.fingerprint:
            raise MismatchError(
                f"{later.name} does not follow {earlier.name}",
                file=later.place,
                expected=f"fingerprint {earlier.tuned.fingerprint}",
                found=later.base.fingerprint,
                hint="a link of the chain is missing, or the patches are in another order",
            )
    found = fingerprint(checkpoint)
    for number, patch in enumerate(patches):
        if patch.base.fingerprint == found:
            return tuple(one.forward for one in patches[number:])
    _require(patches[0], checkpoint, patches[0].base, patches[-1].tuned)
    return (patches[-1].forward,)


def _require(patch: LosslessPatch, checkpoint: Checkpoint, *sides: Provenance) -> None:
    """Raise a `MismatchError` unless the checkpoint is one of ``sides`` of a patch."""
    found = fingerprint(checkpoint)
    if found not in [side.fingerprint for side in sides]:
        raise MismatchError(
            f"{patch.name} was made from another checkpoint",
            file=checkpoint.name,
            expected=f"fingerprint {sides[0].fingerprint}",
            found=found,
            hint=f"expected {sides[0].label}" if sides[0].label else None,
        )


def chain_of(folder: Path, last: int | None) -> list[LosslessPatch]:
    """The patches of a folder, each followed by the next, up to number ``last``.

    The number of a patch is the last number in its file's name. None if the folder holds no lossless patch.
    Raises a `UsageError` if none has that number, and a `MismatchError` if they are not one chain.
    """
    paths = [path for path in sorted(folder.glob("*.safetensors")) if PATCH_KEY in read_header(path).metadata]
    found = [patch for patch in map(load_any, paths) if isinstance(patch, LosslessPatch)]
    if not found:
        return []
    after = {patch.base.fingerprint: patch for patch in found}
    made = {patch.tuned.fingerprint for patch in found}
    first = [patch for patch in found if patch.base.fingerprint not in made]
    if len(after) != len(found) or len(first) != 1:
        starts = ", ".join(Path(str(patch.path)).name for patch in first) or "none"
        raise MismatchError(
            "the patches of the folder are not one chain",
            file=folder,
            expected="one patch that follows no other",
            found=starts,
            hint="a link is missing, or patches of several chains lie here",
        )
    chain = [first[0]]
    while (following := after.get(chain[-1].tuned.fingerprint)) is not None and following not in chain:
        chain.append(following)
    if last is None:
        return chain
    for count, patch in enumerate(chain, 1):
        digits = re.findall(r"\d+", Path(str(patch.path)).stem)
        if digits and int(digits[-1]) == last:
            return chain[:count]
    raise UsageError(f"no patch of the chain has the number {last}", file=folder)
