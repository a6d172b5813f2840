"""apply and revert of lossless patches: whole checkpoints, written anew from their difference."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.folder_files import folder_files
from ..checkpoint.provenance import Provenance, fingerprint
from ..checkpoint.weight_files import INDEX_NAME
from ..coding.elements import Carrier
from ..errors import MismatchError, UsageError
from ..patch.delta import Delta, DeltaBlock, block_state
from ..patch.lossless import LosslessPatch
from ..progress import Progress, Stopwatch, Timing, silent
from ..storage.copying import copy_file
from ..storage.output import begin_writeback, staged_directory, staged_file
from ..storage.output_checks import AnyPath, refuse_output, require_space
from ..storage.positioned import write_exactly
from ..storage.threads import Limits, in_order
from ..text import plural

__all__ = ["RebuildPlan", "RebuildResult", "plan_rebuild"]

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
    patch: LosslessPatch
    delta: Delta | None  # None: the files of `checkpoint` are copied, as it is the base
    goal: str  # ``patched`` or ``base``
    out: Path
    force: bool
    along: tuple[Path, ...]  # files of `checkpoint` that are copied
    timing: Timing

    @property
    def nbytes(self) -> int:
        """Bytes of what is written, files that are copied along not counted."""
        if self.delta is None:
            return sum(shard.size for shard in self.checkpoint.shards)
        return self.delta.nbytes + sum(one.nbytes for one in self.delta.side)

    @property
    def single(self) -> bool:
        """Whether the result is one file."""
        return self.checkpoint.is_file if self.delta is None else self.delta.single

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files."""
        if self.delta is None:
            own = [shard.path.name for shard in self.checkpoint.shards]
        else:
            own = [file.name for file in self.delta.files] + [one.name for one in self.delta.side]
        return (*own, *map(str, self.along))

    def describe(self) -> dict[str, object]:
        """For ``--dry-run`` and JSON."""
        return {
            "checkpoint": self.checkpoint.name,
            "patch": self.patch.name,
            "lossless": True,
            "out": str(self.out),
            "in_place": False,
            "tensors": len(self.patch.forward.tensors if self.delta else self.checkpoint.tensors),
            "files": list(self.names),
            "bytes": self.nbytes,
            "not_carried": list(self.patch.not_carried),
        }

    def run(self, *, limits: Limits | None = None, progress: Progress = silent) -> RebuildResult:
        """Write the checkpoint; every block is checked before and after."""
        limits = limits or Limits.of()
        watch, before = Stopwatch(), self.checkpoint.bytes_read
        with watch.running():
            if self.delta is None:
                self._check_copied(limits, progress)
            self._write(limits, progress)
        watch.bytes_read = self.checkpoint.bytes_read - before
        return RebuildResult(self.out, self.goal, self.names, self.timing + watch.timing)

    def _check_copied(self, limits: Limits, progress: Progress) -> None:
        """Compare what will be copied with the hashes of the base, as far as the patch has them."""
        with progress("checking", self.patch.forward.nbytes) as advance:
            advance(sum(file.header.size for file in self.patch.forward.files))
            for block, (_, state, _) in in_order(
                lambda block: block_state(self.checkpoint, block),
                self.patch.forward.blocks,
                limits.workers(_BLOCK_MEMORY),
            ):
                if state != int(self.patch.forward.before[block.number]):
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
        self.patch.check_unchanged()

    def _write_folder(self, folder: Path, limits: Limits, advance: Callable[[int], None]) -> None:
        if self.delta is not None:
            for one in self.delta.side:
                (folder / one.name).write_bytes(self.delta.side_content(one, self.checkpoint.root))
                advance(one.nbytes)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        weights = len(self.checkpoint.shards if self.delta is None else self.delta.files)
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
        if self.delta is None:
            copy_file(self.checkpoint.shards[number].path, fd, progress=advance)
            return
        delta, file = self.delta, self.delta.files[number]
        os.ftruncate(fd, file.nbytes)
        write_exactly(fd, file.start, 0)
        advance(file.header.size)

        def write(block: DeltaBlock) -> None:
            found = self._rebuilt(delta, block)
            write_exactly(fd, found.data.cast("B"), block.offset)
            begin_writeback(fd, block.offset, block.nbytes)

        blocks = (block for block in delta.blocks if block.file is file)
        for block, _ in in_order(write, blocks, limits.workers(_BLOCK_MEMORY)):
            advance(block.nbytes)

    def _rebuilt(self, delta: Delta, block: DeltaBlock) -> Carrier:
        """A block of the result. What is the result's already, stays."""
        found, state, whole = block_state(self.checkpoint, block)
        if state == int(delta.before[block.number]):
            return delta.decoded(block, found)
        if found is not None and whole and state == int(delta.after[block.number]):
            return found
        raise self._another(block)

    def _another(self, block: DeltaBlock) -> MismatchError:
        return MismatchError(
            f"{self.patch.name} was made from another {'base' if self.goal == 'patched' else 'checkpoint'}",
            file=self.checkpoint.name,
            tensor=block.info.name,
            hint="nothing was written; `neftsurgery verify` shows every tensor's state",
        )


def plan_rebuild(
    named: AnyPath,
    patch: LosslessPatch,
    *,
    goal: str,
    base: AnyPath | None = None,
    out: AnyPath | None,
    in_place: bool = False,
    force: bool = False,
) -> RebuildPlan:
    """Check everything that applying or reverting a lossless patch needs; nothing is written."""
    if in_place or out is None:
        raise UsageError(
            "a lossless patch makes a whole checkpoint, and is not applied in place",
            file=patch.place,
            hint="write a new checkpoint with [[out=...]]",
        )
    delta = patch.forward if goal == "patched" else patch.backward
    if delta is None and base is None:
        raise UsageError(
            "the patch does not hold the way back",
            file=patch.place,
            hint="name the checkpoint it was made from with [[base=...]]; [[reversible=True]] makes patches "
            "that hold the way back",
        )
    watch = Stopwatch()
    with watch.running():
        checkpoint = Checkpoint.open(named)
        source, target = (patch.base, patch.tuned) if goal == "patched" else (patch.tuned, patch.base)
        _require(patch, checkpoint, source, target)
        inputs = [checkpoint.source.path, *([patch.path] if patch.path is not None else [])]
        along: tuple[Path, ...] = ()
        if base is not None and goal == "base":
            checkpoint, delta = Checkpoint.open(base), None
            inputs.append(checkpoint.source.path)
            _require(patch, checkpoint, target)
            along = () if checkpoint.is_file else folder_files(checkpoint).along
        elif delta is not None and patch.manifest.get("weights_only") is True and not checkpoint.is_file:
            own = {file.name for file in delta.files} | {INDEX_NAME}
            along = tuple(path for path in folder_files(checkpoint).along if str(path) not in own)
        if delta is not None and delta.single:
            along = ()
        plan = RebuildPlan(checkpoint, patch, delta, goal, Path(out), force, along, watch.timing)
        refuse_output(out, inputs=inputs, force=force, kind="file" if plan.single else "directory")
    return dataclasses.replace(plan, timing=watch.timing)


def _require(patch: LosslessPatch, checkpoint: Checkpoint, *sides: Provenance) -> None:
    """Raise a `MismatchError` unless the checkpoint is one of the patch's sides."""
    found = fingerprint(checkpoint)
    if found not in [side.fingerprint for side in sides]:
        raise MismatchError(
            f"{patch.name} was made from another checkpoint",
            file=checkpoint.name,
            expected=f"fingerprint {sides[0].fingerprint}",
            found=found,
            hint=f"expected {sides[0].label}" if sides[0].label else None,
        )
