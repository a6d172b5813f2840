"""apply and revert of lossless patches: whole checkpoints from their difference, written anew or in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.folder_files import folder_files
from ..checkpoint.journal import require_writable
from ..checkpoint.provenance import fingerprint
from ..errors import CorruptFileError, UsageError
from ..patch.delta import DeltaBlock, WeightFile, blocks_of
from ..patch.lossless import LosslessPatch
from ..progress import Progress, Stopwatch, Timing, silent
from ..sources.resolve import Source, is_index
from ..storage.output import begin_writeback
from ..storage.output_checks import AnyPath, refuse_output
from ..storage.positioned import write_exactly
from ..storage.threads import Limits, in_order
from .block_changes import BlockChanges, require_same_layout
from .chains import links_from, require_end
from .model_files import BLOCK_MEMORY, ModelFiles, RebuiltWeights, require_result
from .rewrite import RewriteResult, require_place, written_checkpoint


@dataclass(frozen=True)
class RebuildPlan:
    """A checkpoint that is written anew. Made by `plan_rebuild`; nothing is written yet."""

    checkpoint: Checkpoint  # what is read
    patches: tuple[LosslessPatch, ...]
    target: ModelFiles
    goal: str  # ``patched`` or ``base``
    out: Path | None  # None: in place
    force: bool
    along: tuple[Path, ...]  # files of `checkpoint` that are copied
    changes: BlockChanges | None  # in place
    timing: Timing
    warnings: tuple[str, ...] = ()

    @property
    def named(self) -> Checkpoint:
        """What is changed in place, or read to write another one."""
        return self.checkpoint if self.changes is None else self.changes.checkpoint

    @property
    def needed(self) -> bool:
        """Whether anything has to be written."""
        return self.changes is None or bool(self.changes.changes or self.changes.side)

    @property
    def nbytes(self) -> int:
        """Bytes of what is written, files that are copied along not counted."""
        return self.target.nbytes + self.target.side_bytes if self.changes is None else self.changes.nbytes

    @property
    def side(self) -> list[str]:
        """The files beside the weights that are written, not copied along."""
        return [name for name in self.target.side if Path(name) not in self.along]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files that are written."""
        if self.changes is not None:
            return self.changes.names
        return (*(file.name for file in self.target.files), *self.side, *map(str, self.along))

    def describe(self) -> dict[str, object]:
        """For ``--dry-run`` and JSON."""
        return {
            "checkpoint": self.named.name,
            "patches": [patch.name for patch in self.patches],
            "lossless": True,
            "out": None if self.out is None else str(self.out),
            "in_place": self.out is None,
            "tensors": len(self.target.weights.tensors),
            "files": list(self.names),
            "bytes": self.nbytes,
            "not_carried": list(self.target.not_carried),
        }

    def run(self, *, limits: Limits | None = None, progress: Progress = silent) -> RewriteResult:
        """Write the checkpoint; every block is checked before and after."""
        limits = limits or Limits.of()
        watch, before = Stopwatch(), self.checkpoint.bytes_read
        with watch.running():
            if self.out is not None:
                self._write(self.out, limits, progress)
            elif self.changes is not None and self.needed:
                self.changes.write(lambda: self._check_result(self.named.source), limits, progress)
        watch.bytes_read = self.checkpoint.bytes_read - before
        return RewriteResult(
            self.out or self.named.source.path,
            self.goal,
            self.needed,
            tensors=len(self.target.weights.tensors),
            timing=self.timing + watch.timing,
            files=self.names,
        )

    def _write(self, out: Path, limits: Limits, progress: Progress) -> None:
        target = self.target
        with (
            progress("writing", target.nbytes) as advance,
            written_checkpoint(out, single=target.single, force=self.force, nbytes=self.nbytes) as new,
        ):
            for name in self.side:
                new.write(name, target.side[name]())
            for file in target.files:
                with new.opened(file.name, 0o666) as fd:
                    self._write_weights(file, fd, limits, advance)
            new.copy_along(self.checkpoint.root, self.along)
            self._check_result(Source(new.path, str(out)))

    def _check_result(self, source: Source) -> None:
        """What was written must have the fingerprint that the patch records."""
        patch = self.patches[-1]
        for one in self.patches:
            one.check_unchanged()
        if source.path != self.checkpoint.source.path:  # else it was changed here
            self.checkpoint.check_unchanged()
        expected = patch.tuned if self.goal == "patched" else patch.base
        try:
            found = fingerprint(Checkpoint.read(source))
        except (CorruptFileError, UsageError) as error:
            found = error.what
        require_result(found, patch, expected)

    def _write_weights(
        self, file: WeightFile, fd: int, limits: Limits, advance: Callable[[int], None]
    ) -> None:
        os.ftruncate(fd, file.nbytes)
        write_exactly(fd, file.start, 0)
        advance(file.header.size)

        def write(block: DeltaBlock) -> None:
            write_exactly(fd, self.target.read(block).data.cast("B"), block.offset)
            begin_writeback(fd, block.offset, block.nbytes)

        for block, _ in in_order(write, blocks_of([file]), limits.workers(BLOCK_MEMORY)):
            advance(block.nbytes)


def plan_rebuild(
    named: AnyPath,
    patches: Sequence[LosslessPatch],
    goal: str,
    *,
    base: AnyPath | None = None,
    out: AnyPath | None = None,
    in_place: bool = False,
    force: bool = False,
    limits: Limits | None = None,
    progress: Progress = silent,
) -> RebuildPlan:
    """Check everything that applying or reverting lossless patches needs; nothing is written."""
    last = patches[-1]
    require_place(named, out, in_place)
    if goal == "base" and base is None and last.backward is None:
        raise UsageError(
            "the patch does not hold the way back",
            file=last.place,
            hint="name the checkpoint it was made from with [[base=...]]; [[reversible=True]] makes patches "
            "that hold the way back",
        )
    watch = Stopwatch()
    with watch.running():
        here = checkpoint = Checkpoint.open(named)
        inputs = [here.source.path, *(patch.path for patch in patches if patch.path is not None)]
        if goal == "patched":
            patches = links_from(here, patches)
        else:
            require_end(last, here, last.tuned, last.base)
        if goal == "patched" or base is None:
            target = RebuiltWeights.model(here, patches, goal)
        else:
            checkpoint = Checkpoint.open(base)
            inputs.append(checkpoint.source.path)
            require_end(last, checkpoint, last.base)
            target = replace(ModelFiles.of(checkpoint), base_of=last, not_carried=())
        weights_only = any(patch.weights_only for patch in patches)
        along: tuple[Path, ...] = ()
        if not (checkpoint.is_file or target.single) and (weights_only or checkpoint is not here):
            own = {file.name for file in target.files}
            copied = folder_files(checkpoint).along
            along = tuple(path for path in copied if str(path) not in own and not is_index(path.name))
        changes = None
        if out is None:
            require_same_layout(here, target)
            require_writable(here, here.shards)
            limits = limits or Limits.of()
            changes = BlockChanges.find(here, target, weights_only, limits, progress)
        else:
            kind: Literal["file", "directory"] = "file" if target.single else "directory"
            refuse_output(out, inputs=inputs, force=force, kind=kind)
    watch.bytes_read = here.bytes_read
    place = None if out is None else Path(out)
    return RebuildPlan(checkpoint, tuple(patches), target, goal, place, force, along, changes, watch.timing)
