"""merge: several patches of one base become one patch, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypedDict, Unpack, overload

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import boundary
from ..neurons.vectors import block_memory
from ..options import ChainOptions, OutputOptions, RunOptions, split
from ..patch.lossless import AnyPatch, LosslessPatch, load_any
from ..patch.merging import ARITHMETIC, Part, magnitudes, merge_rows
from ..patch.overlap import Meeting
from ..patch.patch import Patch
from ..patch.patch_file import other_kind
from ..patch.write import NewPatch
from ..progress import Progress, Stopwatch, Timing, silent
from ..selection.choice import CutSearch
from ..selection.selection import RowBlock
from ..storage.output_checks import AnyPath, refuse_output
from ..storage.threads import Limits
from ..tensors.arrays import Int64Array, RawBytes
from .chains import plan_chain
from .lossless import CodingAndRun, LosslessPlan
from .merge_checks import OverlapRule, check_patches, plan_union, refuse_other_options
from .verb import base_rows, named_base, other_base, running, warn


@dataclass(frozen=True)
class MergePlan:
    """Everything is checked, nothing is written. Made by `plan_merge`."""

    patches: Sequence[Patch]
    rule: OverlapRule
    base: Checkpoint | None
    meetings: Mapping[str, Meeting]  # by tensor: who replaces what
    new: NewPatch
    out: Path | None  # None: a temporary file
    force: bool
    warnings: Sequence[str]
    timing: Timing  # of checking

    @cached_property
    def grouped(self) -> frozenset[str]:
        """The codes and scales of quantized weights, which are never computed with."""
        return frozenset(name for group in self.new.groups for name in group.members.values())

    @property
    def shared(self) -> int:
        """Neurons that several patches replace, companion biases not counted."""
        biases = self.new.selection.facts.companion_biases
        return sum(len(meeting.shared) for name, meeting in self.meetings.items() if name not in biases)

    @property
    def nbytes(self) -> int:
        """Bytes of the merged patch's file."""
        return self.new.nbytes

    def describe(self) -> dict[str, object]:
        """For ``--dry-run`` and JSON."""
        return {
            "patches": [patch.name for patch in self.patches],
            **self.rule.describe(),
            "neurons": self.new.selection.neurons,
            **self.new.selection.describe(),
            "shared": self.shared,
            "reversible": self.new.reversible,
            "bytes": self.nbytes,
            "out": None if self.out is None else str(self.out),
            "warnings": list(self.warnings),
        }

    def run(self, *, limits: Limits | None = None, progress: Progress = silent) -> Patch:
        """Write the merged patch."""
        limits, chosen = limits or Limits.of(), self.new.selection
        # To compute with, to keep, or to check a base that was named.
        reads_base = self.base is not None or self.new.reversible or self.rule.needs_base
        memory = block_memory((one.layout for one in chosen), limits.block)
        workers = limits.workers((len(self.patches) + 2) * memory // 3)
        with Stopwatch() as watch, self.new.written(self.out, force=self.force) as writer:
            least = _thresholds(self, limits.block) if self.rule.name == "ties" else None

            def rows(block: RowBlock) -> tuple[RawBytes, RawBytes | None, RawBytes]:
                tensor = _Rows(self, block.name, self.meetings[block.name].union[block.start : block.stop])
                before = tensor.before()
                old = tensor.old(before) if reads_base else None
                parts = [part for _, part in tensor.held(least)]
                dtype = chosen.tensors[block.name].info.dtype
                rule = (
                    "first" if block.name in self.grouped and self.rule.name in ARITHMETIC else self.rule.name
                )
                return merge_rows(rule, dtype, parts, old, len(before)), old, before

            with progress("merging", chosen.nbytes) as advance:
                writer.write_blocks(rows, workers, limits.block, advance)
            for patch in self.patches:
                watch.bytes_read += patch.value_bytes
                patch.check_unchanged()
            if self.base is not None:
                self.base.check_unchanged()
                watch.bytes_read += self.base.bytes_read
        writer.patch.timing = self.timing + watch.timing
        return writer.patch


class OverlapOptions(TypedDict, total=False):
    """What is done with neurons that several patches replace."""

    on_overlap: str
    weights: Sequence[float] | None
    density: float | None


class _KeptOptions(OutputOptions, total=False):
    """What a merged patch of either kind holds, and where it is written."""

    base: AnyPath | None
    reversible: bool | None


class MergeAndRun(OverlapOptions, _KeptOptions, RunOptions):
    """The keywords of `merge` for patches of one base."""


class AnyMergeOptions(MergeAndRun, ChainOptions):
    """The keywords of `merge` of either kind."""


@overload
def merge(
    patches: Sequence[AnyPatch],
    *,
    chain: Literal[True],
    base: AnyPath,
    **options: Unpack[CodingAndRun],
) -> LosslessPatch: ...


@overload
def merge(patches: Sequence[AnyPatch], **options: Unpack[MergeAndRun]) -> Patch: ...


@boundary
def merge(patches: Sequence[AnyPatch], **options: Unpack[AnyMergeOptions]) -> Patch | LosslessPatch:
    """Make one patch of several patches of one base, or of lossless patches that follow each other.

    Neurons that one patch alone replaces are taken as they are; ``on_overlap`` says what becomes of
    those that several replace. The mean of the patches of clients that trained the same neurons is
    federated averaging.

    Args:
        patches: Patches or paths. Each is checked against its own hashes.
        chain: The patches are lossless, and each was made from what the one before it makes; a folder stands
            for its patches. The result leads from the first base, which must be given, to the last
            checkpoint.
        fast, weights_only: Of the patch of a chain, as in `extract`; by default if every patch is so.
        on_overlap: ``error``; ``first`` or ``last`` of them wins; ``mean`` of the new values; ``sum`` of the
            differences from the base; ``ties``: TIES-Merging (Yadav et al., NeurIPS 2023). See
            `neftsurgery.patch.merging`. Computed in float64 and rounded once, to the tensor's own dtype.
        weights: One a patch, for ``mean``, ``sum`` and ``ties``. ``sum`` scales every difference of a patch
            by its weight, also of neurons that it alone replaces.
        density: For ``ties``: the share of each patch's differences, over all neurons it shares with others,
            that is kept. By default 0.2, as in the paper.
        base: The checkpoint that the patches were made from. ``sum`` and ``ties`` need it where the patches
            do not hold the replaced values themselves. Every replaced vector is compared with its digest.
        reversible: Keep the replaced values; by default if every patch has them.
        out, force, threads, memory, progress: As in `extract`.

    Raises:
        UsageError: For options that make no sense or do not go together, or an ``out`` that exists; if
            replaced values are needed and nobody has them.
        MismatchError: If the patches were made from different bases, cut a tensor along different axes, or
            overlap under ``error``; if ``base`` is not theirs.
        CorruptFileError, MachineError: If a patch's hashes do not match its content; if something cannot be
            read or written.
    """
    plan = plan_merge(patches, **options)
    warn(__name__, plan.warnings)
    return plan.run(**running(options))


def plan_merge(named: Sequence[AnyPatch], **options: Unpack[AnyMergeOptions]) -> MergePlan | LosslessPlan:
    """Check everything that `merge` needs; nothing is written."""
    groups = (ChainOptions, OverlapOptions, _KeptOptions, RunOptions)
    coding, overlap, kept, run = split("merge", options, *groups)
    refuse_other_options(chain := coding.pop("chain", False), overlap, coding)
    base, force, reversible = kept.pop("base", None), kept.get("force", False), kept.get("reversible")
    if chain:
        return plan_chain(named, base, kept | coding)
    rule = OverlapRule.of(len(named), **overlap)
    patches = [_loaded(patch) for patch in named]
    original, inputs = named_base(base, patches)
    place = refuse_output(kept.get("out"), inputs=inputs, force=force, kind="file")
    keep = reversible if reversible is not None else all(patch.reversible for patch in patches)
    with Stopwatch() as watch:
        watch.bytes_read = sum(patch.value_bytes for patch in patches)
        found, new, warnings = plan_union(patches, rule, original, keep)
        check_patches(patches, running(run)["progress"])
        warnings += other_base(original, new.manifest.base, "the patches")
    return MergePlan(patches, rule, original, found, new, place, force, warnings, watch.timing)


def _loaded(named: AnyPatch) -> Patch:
    patch = load_any(named)
    if isinstance(patch, LosslessPatch):
        advice = "lossless patches that follow each other become one with [[chain=True]]"
        raise other_kind(patch.kind, patch.place, advice)
    return patch


class _Rows:
    """Some neurons of one tensor, as the patches that replace them have them."""

    def __init__(self, plan: MergePlan, name: str, index: Int64Array) -> None:
        self._plan, self._name, self._index = plan, name, index
        # All neurons that a patch has between the first and the last one are among them: they are of a union.
        self._held: list[tuple[int, Int64Array, int, int]] = []
        for holder in plan.meetings[name].holders:
            theirs = plan.patches[holder].index(name)
            low, high = np.searchsorted(theirs, [index[0], index[-1] + 1]).tolist()
            slots = np.searchsorted(index, theirs[low:high])
            if high > low:
                self._held.append((holder, slots, low, high))

    def before(self) -> RawBytes:
        """The digests of the replaced vectors."""
        found = np.empty((len(self._index), 16), np.uint8)
        for holder, slots, low, high in self._held:
            found[slots] = self._plan.patches[holder].base_digests(self._name, low, high)
        return found

    def old(self, before: RawBytes) -> RawBytes:
        """The replaced vectors; zeros where no patch holds them and they are not needed."""
        chosen = self._plan.new.selection.tensors[self._name]
        if self._plan.base is not None:
            return base_rows(self._plan.base, chosen, self._index, before, "the patches were")
        rows = np.zeros((len(self._index), chosen.layout.width * chosen.info.type.itemsize), np.uint8)
        for holder, slots, low, high in self._held:
            if self._plan.patches[holder].tensors[self._name].reversible:
                rows[slots] = self._plan.patches[holder].base_values(self._name, low, high)
        return rows

    def held(self, least: Sequence[float] | None = None) -> Iterator[tuple[int, Part]]:
        """The number of each patch that replaces any of them, with its new values."""
        for n, slots, low, high in self._held:
            values = self._plan.patches[n].values(self._name, low, high)
            yield n, Part(slots, values, self._plan.rule.weights[n], least[n] if least else 0.0)


def _thresholds(plan: MergePlan, size: int | None) -> list[float]:
    """Per patch how large a difference must be for ``ties`` to keep it."""
    found = [CutSearch() for _ in plan.patches]
    for again in (False, True):
        for block in plan.new.selection.blocks(size):
            meeting = plan.meetings[block.name]
            index = meeting.union[block.start : block.stop]
            common = np.isin(index, meeting.shared, assume_unique=True)
            if not common.any() or block.name in plan.grouped:
                continue
            rows = _Rows(plan, block.name, index)
            old, dtype = rows.old(rows.before()), plan.new.selection.tensors[block.name].info.dtype
            for holder, part in rows.held():
                here = common[part.slots]
                for some in magnitudes(part.values[here], old[part.slots[here]], dtype):
                    found[holder].add(some)
        for one in found:
            one.settle(one.room if again else max(1, round(plan.rule.density * one.total)) - 1)
    return [float(one.cut) for one in found]
