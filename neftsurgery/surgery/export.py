"""export: write a patch as a LoRA adapter for PEFT and vLLM, exact up to one rounding."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, UsageError, boundary
from ..neurons.vectors import block_memory
from ..options import RunOptions
from ..patch.patch import Patch
from ..progress import Progress, Stopwatch, Timing, silent
from ..storage.output import staged_directory
from ..storage.output_checks import AnyPath, refuse_output
from ..storage.threads import Limits, in_order
from ..tensors.floats import narrow, widen
from ..tensors.header import TensorInfo
from ..tensors.writer import TensorFileWriter, planned_bytes, written_file
from ..text import commas, percent, plural, printable, size
from .lora_modules import STEPS, LoraModule, adapter_config, lora_modules, next_step, task_of
from .same_base import named_base, other_base
from .verb import replaced_rows, require_replaced, run_keywords, warn

__all__ = ["ExportPlan", "ExportResult", "export_lora", "plan_export"]

log = logging.getLogger(__name__)

_METADATA = {"format": "pt"}
_CHUNK_BYTES = 16 << 20  # of a factor that is filled column by column
_BATCH_BYTES = 1 << 20  # of raw vectors, computed with at once


@dataclass(frozen=True)
class ExportResult:
    """The adapter that was written.

    Attributes
    ----------
    out:
        The adapter folder.
    modules, rank:
        What it changes, and at which rank.
    elements, inexact:
        Replaced elements; how many of them differ from base plus update, added in float32 and rounded to the
        base's dtype.
    nbytes:
        Bytes of the adapter's weights.
    timing:
        What it took.
    """

    out: Path
    modules: Sequence[LoraModule] = field(repr=False)
    rank: int
    elements: int
    inexact: int
    nbytes: int
    timing: Timing = field(default_factory=Timing, repr=False)

    @property
    def exactness(self) -> str:
        """How exact base plus adapter is, in words."""
        if not self.inexact:
            return f"base plus adapter is base plus patch in all {commas(self.elements)} elements"
        share = percent(self.inexact / self.elements)
        return (
            f"{commas(self.inexact)} of {commas(self.elements)} elements ({share}) do not round back in the "
            "float32 sum: they are off by the rounding of the difference"
        )

    def __str__(self) -> str:
        what = f"{plural(len(self.modules), 'module')} at rank {self.rank}, {size(self.nbytes)}"
        return printable(f"{self.out}: {what}; {self.exactness}")


@dataclass(frozen=True)
class ExportPlan:
    """Everything is checked; nothing is written. Made by `plan_export`."""

    patch: Patch
    base: Checkpoint | None
    modules: Sequence[LoraModule]
    needed: int  # the rank that the patch needs
    rank: int  # the rank that all modules are padded to
    config: Mapping[str, Any]  # of adapter_config.json
    out: Path
    force: bool
    warnings: Sequence[str]

    @property
    def nbytes(self) -> int:
        """Bytes of the file of the adapter's weights."""
        return planned_bytes(self._entries, _METADATA)

    @property
    def _entries(self) -> list[TensorInfo]:
        return [entry for module in self.modules for entry in module.entries(self.rank)]

    def describe(self) -> dict[str, object]:
        """For ``--dry-run`` and JSON."""
        return {
            "patch": self.patch.name,
            "out": str(self.out),
            "modules": len(self.modules),
            "neurons": self.patch.neurons,
            "selected": self.patch.neurons,
            "rank": self.rank,
            "rank_needed": self.needed,
            "elements": self.patch.parameters,
            "bytes": self.nbytes,
            "patch_bytes": self.patch.nbytes,
            "warnings": list(self.warnings),
        }

    def run(self, *, limits: Limits | None = None, progress: Progress = silent) -> ExportResult:
        """Write the adapter folder."""
        limits = limits or Limits.of()
        layouts = [tensor.layout for tensor in self.patch.tensors.values()]
        workers = limits.workers(block_memory(layouts, limits.block) + _CHUNK_BYTES)
        touched = [self.patch.tensors[module.tensor] for module in self.modules]
        total = sum(tensor.count * tensor.vector_bytes for tensor in touched)
        watch, inexact = Stopwatch(), 0
        with watch.running(), staged_directory(self.out, force=self.force) as folder:
            self.patch.check(limits=limits)
            with written_file(self._entries, _METADATA, folder / WEIGHTS_NAME) as written:

                def write(module: LoraModule) -> int:
                    factors = _Factors(self, module, written, limits.block)
                    return factors.write_rows() if module.rows else factors.write_columns()

                with progress("exporting", total) as advance:
                    for module, lost in in_order(write, self.modules, workers):
                        inexact += lost
                        tensor = self.patch.tensors[module.tensor]
                        advance(tensor.count * tensor.vector_bytes)
                written.finish(_METADATA)
            (folder / CONFIG_NAME).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
            self.patch.check_unchanged()
            if self.base is not None:
                self.base.check_unchanged()
        watch.bytes_read = 2 * total
        nbytes = (self.out / WEIGHTS_NAME).stat().st_size
        return ExportResult(
            self.out, self.modules, self.rank, self.patch.parameters, inexact, nbytes, watch.timing
        )


@boundary
def export_lora(
    patch: Patch | AnyPath,
    out: AnyPath,
    *,
    base: AnyPath | None = None,
    rank: int | None = None,
    prefix: str = "",
    force: bool = False,
    **options: Unpack[RunOptions],
) -> ExportResult:
    """Write a patch as a LoRA adapter folder that PEFT loads.

    Parameters
    ----------
    patch:
        A patch of rows or columns of linear weights.
    out:
        The adapter folder, which is written atomically.
    base:
        The checkpoint the patch was made from; a reversible patch does not need it. Its config says which
        weights are stored ``[in, out]``.
    rank:
        The rank that all modules are padded to; by default the next of vLLM's ranks.
    prefix:
        Put before the names of modules if the live model's names have it and the files' do not, such as
        ``transformer.`` for a GPT-2 that was saved without its head.
    force:
        Replace ``out`` if it exists.
    threads, memory, progress:
        As in `diff`.

    Raises
    ------
    UsageError
        If ``out`` exists, or the patch does not hold the replaced values and ``base`` is not given.
    MismatchError
        If a tensor of the patch has no LoRA form or needs a larger rank, or ``base`` is not the patch's base.
    CorruptFileError, MachineError
        If the patch's hashes do not match its content; if something cannot be read or written.
    """
    run = run_keywords("export_lora", options)
    plan = plan_export(patch, out, base=base, rank=rank, prefix=prefix, force=force)
    warn(log, plan.warnings)
    return plan.run(**run)


def plan_export(
    patch: Patch | AnyPath,
    out: AnyPath,
    *,
    base: AnyPath | None = None,
    rank: int | None = None,
    prefix: str = "",
    force: bool = False,
) -> ExportPlan:
    """Check everything that `export_lora` needs; nothing is written."""
    patch = patch if isinstance(patch, Patch) else Patch.load(patch)
    original, inputs = named_base(base, [patch])
    refuse_output(out, inputs=inputs, force=force, kind="directory")
    if original is None:
        require_replaced(patch, "a LoRA")
    if patch.groups:
        raise MismatchError(
            "the patch holds codes of quantized weights, which are not numbers to factor",
            file=patch.place,
            tensor=patch.groups[0].codes,
            hint="export a patch of the checkpoints before quantization",
        )
    modules, warnings = lora_modules(patch, original, prefix)
    warnings += other_base(original, patch.base, patch.name)
    needed = max(module.count for module in modules)
    chosen = _rank(patch, modules, needed, rank)
    if next_step(chosen) != chosen:
        step = next_step(chosen)
        serve = f"serve it with `--max-lora-rank {step}`" if step else "vLLM will not serve it"
        warnings.append(f"{chosen} is not one of vLLM's ranks, {', '.join(map(str, STEPS))}: {serve}")
    known = patch.base.label
    if original is not None and original.source.repo is not None:
        known = original.source.repo
    config = adapter_config(modules, chosen, known, task_of(original))
    return ExportPlan(patch, original, modules, needed, chosen, config, Path(out), force, warnings)


def _rank(patch: Patch, modules: Sequence[LoraModule], needed: int, rank: int | None) -> int:
    if rank is not None:
        if rank < needed:
            raise UsageError(
                "[[rank]] is too small for this patch",
                file=patch.place,
                tensor=next(module.tensor for module in modules if module.count == needed),
                expected=f"at least {needed}, the neurons of its largest module",
                found=rank,
            )
        return rank
    step = next_step(needed)
    if step is None:
        raise MismatchError(
            "the patch is too large for a LoRA that can be served",
            file=patch.place,
            tensor=next(module.tensor for module in modules if module.count == needed),
            expected=f"at most {STEPS[-1]} neurons of one tensor",
            found=needed,
            hint="write the patched checkpoint: `neftsurgery apply BASE PATCH -o OUT`; or choose fewer with "
            f"[[max_per_tensor={STEPS[-1]}]]; for PEFT alone, [[rank={needed}]]",
        )
    return step


class _Factors:
    """Writes the two factors of one module. Elements that are not written are zero."""

    def __init__(
        self, plan: ExportPlan, module: LoraModule, writer: TensorFileWriter, block: int | None
    ) -> None:
        self._block = block
        self._plan, self._module, self._writer = plan, module, writer
        self._tensor = plan.patch.tensors[module.tensor]
        self._index = plan.patch.index(module.tensor)

    def write_rows(self) -> int:
        """Write differences as rows of ``A``, ones in ``B``; returns how many elements do not round back."""
        first, second = self._module.names
        inexact = 0
        for start, _, differences, lost in self._differences(slice(0, self._module.inputs)):
            self._writer.write(first, start, differences)
            inexact += lost
        for place, neuron in enumerate(self._index.tolist()):
            self._writer.write(second, neuron, self._one(place, self._plan.rank))
        return inexact

    def write_columns(self) -> int:
        """Write ones in ``A``, differences as columns of ``B``; as `write_rows`."""
        first, second = self._module.names
        for place, neuron in enumerate(self._index.tolist()):
            self._writer.write(first, place, self._one(neuron, self._module.inputs))
        inexact = 0
        step = max(1, (self._block or _CHUNK_BYTES) // (4 * self._plan.rank))
        for low in range(0, self._module.outputs, step):
            part = slice(low, min(low + step, self._module.outputs))
            filled = np.zeros((part.stop - low, self._plan.rank), np.float32)
            for start, stop, differences, lost in self._differences(part):
                filled[:, start:stop] = differences.T
                inexact += lost
            self._writer.write(second, low, filled)
        return inexact

    def _differences(self, part: slice) -> Iterator[tuple[int, int, NDArray[np.float32], int]]:
        """Per block of neurons: start, stop, part of their differences, how many do not round back."""
        patch, name, dtype = self._plan.patch, self._module.tensor, self._tensor.info.dtype
        size = self._tensor.info.type.itemsize
        part = slice(part.start * size, part.stop * size)
        step = max(1, _BATCH_BYTES // (part.stop - part.start))
        for start, stop in self._tensor.blocks(self._block):
            values = patch.values(name, start, stop)[:, part]
            replaced = replaced_rows(patch, self._plan.base, name, start, stop)[:, part]
            for low in range(0, stop - start, step):
                new, old = (widen(rows[low : low + step], dtype) for rows in (values, replaced))
                with np.errstate(over="ignore", invalid="ignore"):
                    differences = (new - old).astype(np.float32)
                if not np.isfinite(differences).all():
                    raise MismatchError(
                        "a difference is infinite or NaN: a product would spread it over the whole weight",
                        file=patch.place,
                        tensor=name,
                        hint="write the patched checkpoint instead: `neftsurgery apply`",
                    )
                inexact = int(np.count_nonzero(_sum(old, differences, dtype) != new))
                yield start + low, start + low + len(differences), differences, inexact

    def _one(self, place: int, size: int) -> NDArray[np.float32]:
        row = np.zeros((1, size), np.float32)
        row[0, place] = 1
        return row


def _sum(old: NDArray[np.float64], differences: NDArray[np.float32], dtype: str) -> NDArray[np.float64]:
    """What merging gives: added in float32 (float64 if the base is), rounded to the base's dtype."""
    with np.errstate(over="ignore"):
        added = old + differences if dtype == "F64" else old.astype(np.float32) + differences
    return widen(narrow(added, dtype), dtype)
