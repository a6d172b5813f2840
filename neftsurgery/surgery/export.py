"""export: a patch as a LoRA adapter that PEFT and vLLM load, exact but for one rounding."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.opening import open_checkpoint
from ..errors import MismatchError, UsageError, boundary
from ..neurons.vectors import block_memory
from ..patch.lora import STEPS, LoraModule, adapter_config, next_step
from ..patch.patch import Patch
from ..progress import Progress, Timing, silent
from ..storage.output import staged_directory
from ..storage.output_checks import refuse_output
from ..storage.threads import Limits, in_order
from ..tensors.floats import narrow, widen
from ..tensors.writer import TensorFileWriter, written_file
from .lora_plan import lora_modules, task_of
from .replaced import replaced_rows, require_replaced
from .state import check_fit

__all__ = ["Export", "export_lora", "plan_export", "write_adapter"]

log = logging.getLogger(__name__)

_CHUNK_BYTES = 16 << 20  # of a factor that is filled column by column
_BATCH_BYTES = 1 << 20  # of raw vectors, computed with at once


@dataclass
class Export:
    """A planned export; what it gives is filled in as it is carried out.

    Attributes
    ----------
    patch, base:
        The patch, and its base where it was named.
    modules:
        What the adapter changes.
    needed, rank:
        The rank that the patch needs, and the one that all modules are padded to.
    config:
        The content of ``adapter_config.json``.
    warnings:
        Sentences for the user.
    elements, inexact:
        Replaced elements; those which base plus update, added in float32 and rounded to the base's
        dtype, does not give.
    nbytes:
        Bytes of the adapter's weights.
    timing:
        What it took so far.
    """

    patch: Patch
    base: Checkpoint | None
    modules: Sequence[LoraModule]
    needed: int
    rank: int
    config: dict[str, Any]
    warnings: Sequence[str]
    elements: int
    nbytes: int
    inexact: int = 0
    timing: Timing = field(default_factory=Timing)


@boundary
def export_lora(
    patch: Patch | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    prefix: str = "",
    force: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> Export:
    """Write a patch as a LoRA adapter folder that PEFT loads.

    Parameters
    ----------
    patch:
        A patch of rows or columns of linear weights.
    out:
        The adapter folder. It appears whole or not at all.
    base:
        The checkpoint the patch was made from; a reversible patch does without. Its config says which
        weights are stored ``[in, out]``.
    rank:
        What all modules are padded to; by default the next of vLLM's ranks.
    prefix:
        Put before the names of modules, where the files lack what the live model has: ``transformer.``
        for a GPT-2 that was saved without its head.
    force:
        Replace ``out`` if it exists.
    threads, memory:
        As in `diff`.

    Returns
    -------
    Export
        What was written, and how many elements the float32 sum does not round back.

    Raises
    ------
    UsageError
        If ``out`` exists, or the replaced values are neither in the patch nor in ``base``.
    MismatchError
        If something in the patch has no LoRA form, needs a larger rank, or ``base`` is another one.
    CorruptFileError
        If the patch's hashes do not match its content.
    MachineError
        If something cannot be read or written.
    """
    limits = Limits.of(threads, memory)
    loaded = patch if isinstance(patch, Patch) else Patch.load(patch)
    plan = plan_export(loaded, out, base=base, rank=rank, prefix=prefix, force=force)
    for warning in plan.warnings:
        log.warning("%s", warning)
    write_adapter(plan, out, force=force, limits=limits, progress=progress)
    return plan


def plan_export(
    patch: Patch,
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None,
    rank: int | None,
    prefix: str,
    force: bool,
) -> Export:
    """Check everything that `export_lora` needs; nothing is written."""
    original = None if base is None else open_checkpoint(base)
    inputs = [] if original is None else [original.source.path]
    inputs += [] if patch.path is None else [patch.path]
    refuse_output(out, inputs=inputs, force=force, kind="directory")
    if original is None:
        require_replaced(patch, "a LoRA")
    else:
        check_fit(original, patch)
    modules, warnings = lora_modules(patch, original, prefix)
    needed = max(module.count for module in modules)
    chosen = _rank(patch, modules, needed, rank)
    if next_step(chosen) != chosen:
        step = next_step(chosen)
        serve = f"serve it with --max-lora-rank {step}" if step else "vLLM will not serve it"
        warnings.append(f"{chosen} is none of vLLM's ranks, {', '.join(map(str, STEPS))}: {serve}")
    known = patch.base.get("repo") or patch.base.get("name")
    if original is not None and original.source.repo is not None:
        known = original.source.repo
    config = adapter_config(modules, chosen, known, task_of(original))
    nbytes = sum(entry.nbytes for module in modules for entry in module.entries(chosen))
    return Export(patch, original, modules, needed, chosen, config, warnings, patch.parameters, nbytes)


def _rank(patch: Patch, modules: Sequence[LoraModule], needed: int, rank: int | None) -> int:
    if rank is not None:
        if rank < needed:
            raise UsageError(
                "--rank is too small for this patch",
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
            f"--max-per-tensor {STEPS[-1]}; for PEFT alone, --rank {needed}",
        )
    return step


def write_adapter(
    plan: Export,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    limits: Limits,
    progress: Progress = silent,
) -> None:
    """Carry out a planned export; fills in ``inexact``."""
    patch, rank = plan.patch, plan.rank
    layouts = [tensor.layout for tensor in patch.tensors.values()]
    workers = limits.workers(block_memory(layouts) + _CHUNK_BYTES)
    entries = [entry for module in plan.modules for entry in module.entries(rank)]
    total = sum(
        patch.tensors[module.tensor].count * patch.tensors[module.tensor].vector_bytes
        for module in plan.modules
    )
    with plan.timing.clock(), staged_directory(out, force=force) as folder:
        patch.check()
        with written_file(entries, {"format": "pt"}, folder / WEIGHTS_NAME) as written:

            def write(module: LoraModule) -> int:
                factors = _Factors(plan, module, written.writer)
                return factors.write_rows() if module.rows else factors.write_columns()

            with progress("exporting", total) as advance:
                for module, inexact in in_order(write, plan.modules, workers):
                    plan.inexact += inexact
                    tensor = patch.tensors[module.tensor]
                    advance(tensor.count * tensor.vector_bytes)
            written.writer.finish({"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
        plan.patch.check_unchanged()
        if plan.base is not None:
            plan.base.check_unchanged()
    plan.nbytes = (Path(out) / WEIGHTS_NAME).stat().st_size
    plan.timing.bytes_read += 2 * total


class _Factors:
    """Fills the two factors of one module. What is not written is zero."""

    def __init__(self, plan: Export, module: LoraModule, writer: TensorFileWriter) -> None:
        self._plan, self._module, self._writer = plan, module, writer
        self._tensor = plan.patch.tensors[module.tensor]
        self._index = plan.patch.index(module.tensor)

    def write_rows(self) -> int:
        """Rows of differences in ``A``, ones in ``B``; returns how many elements do not round back."""
        first, second = self._module.names
        inexact = 0
        for start, _, differences, lost in self._differences(slice(0, self._module.inputs)):
            self._writer.write(first, start, differences)
            inexact += lost
        for place, neuron in enumerate(self._index.tolist()):
            self._writer.write(second, neuron, self._one(place, self._plan.rank))
        return inexact

    def write_columns(self) -> int:
        """Ones in ``A``, columns of differences in ``B``; as `write_rows`."""
        first, second = self._module.names
        for place, neuron in enumerate(self._index.tolist()):
            self._writer.write(first, place, self._one(neuron, self._module.inputs))
        inexact = 0
        step = max(1, _CHUNK_BYTES // (4 * self._plan.rank))
        for low in range(0, self._module.outputs, step):
            part = slice(low, min(low + step, self._module.outputs))
            filled = np.zeros((part.stop - low, self._plan.rank), np.float32)
            for start, stop, differences, lost in self._differences(part):
                filled[:, start:stop] = differences.T
                inexact += lost
            self._writer.write(second, low, filled)
        return inexact

    def _differences(self, part: slice) -> Iterator[tuple[int, int, NDArray[np.float32], int]]:
        """Blocks of neurons: where, elements ``part`` of their differences, how many do not round back."""
        patch, name, dtype = self._plan.patch, self._module.tensor, self._tensor.info.dtype
        size = self._tensor.info.type.itemsize
        part = slice(part.start * size, part.stop * size)
        step = max(1, _BATCH_BYTES // (part.stop - part.start))
        for start, stop in self._tensor.blocks():
            values = patch.values(name, start, stop)[:, part]
            replaced = replaced_rows(patch, name, self._plan.base, start, stop)[:, part]
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
    """What merging gives: added in float32 (float64 for a base of that), rounded to the base's dtype."""
    with np.errstate(over="ignore"):
        added = old + differences if dtype == "F64" else old.astype(np.float32) + differences
    return widen(narrow(added, dtype), dtype)
