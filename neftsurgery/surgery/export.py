"""export: write a patch as a LoRA adapter for PEFT and vLLM, exact up to one rounding."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.adapter import CONFIG_NAME, WEIGHTS_NAME
from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, UsageError
from ..neurons.vectors import block_memory
from ..options import ExportOptions, split
from ..patch.patch import Patch
from ..progress import Progress, Stopwatch, Timing, silent
from ..storage.output import staged_directory
from ..storage.output_checks import AnyPath, refuse_output
from ..storage.threads import Limits, in_order
from ..tensors.arrays import IndexArray
from ..tensors.floats import narrow, widen
from ..tensors.header import TensorInfo
from ..tensors.writer import TensorFileWriter, planned_bytes, written_file
from ..text import commas, percent, plural, printable, size, some
from .lora_modules import (
    STEPS,
    LivePlaces,
    LoraModule,
    adapted_part,
    adapter_config,
    lora_modules,
    next_step,
    places_in_files,
    ranks,
    task_of,
)
from .verb import named_base, other_base, replaced_rows, require_replaced

_METADATA = {"format": "pt"}
_DTYPES = ("F32", "BF16", "F16")  # of factors
_CHUNK_BYTES = 16 << 20  # of a factor that is filled column by column
_BATCH_BYTES = 1 << 20  # of raw vectors, computed with at once


@dataclass(frozen=True)
class ExportResult:
    """The adapter that was written."""

    out: Path  # its folder
    modules: Sequence[LoraModule] = field(repr=False)  # what it changes
    rank: int  # the largest of several
    # Replaced elements, and how many of them differ from base plus update, added in float32 and rounded to
    # the base's dtype.
    elements: int
    inexact: int
    nbytes: int  # of its weights
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
        what = f"{plural(len(self.modules), 'module')} at {ranks(self.modules)}, {size(self.nbytes)}"
        return printable(f"{self.out}: {what}; {self.exactness}")


@dataclass(frozen=True)
class ExportPlan:
    """Everything is checked; nothing is written. Made by `plan_export`."""

    patch: Patch
    base: Checkpoint | None
    modules: Sequence[LoraModule]
    dtype: str  # of the factors
    config: Mapping[str, Any]  # of adapter_config.json
    out: Path
    force: bool
    warnings: Sequence[str]
    timing: Timing = field(default_factory=Timing)  # of planning, which reads no values

    @property
    def nbytes(self) -> int:
        """Bytes of the file of the adapter's weights."""
        return planned_bytes(self.entries, _METADATA)

    @property
    def entries(self) -> list[TensorInfo]:
        """The factors of all modules."""
        return [entry for module in self.modules for entry in module.entries(self.dtype)]

    @property
    def needed(self) -> int:
        """The rank that the patch needs."""
        return max(module.count for module in self.modules)

    @property
    def rank(self) -> int:
        """The rank of the modules, the largest of several."""
        return max(module.rank for module in self.modules)

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
            "dtype": self.dtype,
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

        def nbytes(module: LoraModule) -> int:
            touched = [self.patch.tensors[name] for name in module.parts]
            return sum(tensor.count * tensor.vector_bytes for tensor in touched)

        total = sum(map(nbytes, self.modules))
        inexact = 0
        with Stopwatch() as watch, staged_directory(self.out, force=self.force) as folder:
            self.patch.check(limits=limits)
            with written_file(self.entries, _METADATA, folder / WEIGHTS_NAME) as written:

                def write(module: LoraModule) -> int:
                    return _Factors(self, module, written, limits.block).write()

                with progress("exporting", total) as advance:
                    for module, lost in in_order(write, self.modules, workers):
                        inexact += lost
                        advance(nbytes(module))
                written.finish(_METADATA)
            (folder / CONFIG_NAME).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
            self.patch.check_unchanged()
            if self.base is not None:
                self.base.check_unchanged()
        watch.bytes_read = 2 * total
        written_bytes = (self.out / WEIGHTS_NAME).stat().st_size
        return ExportResult(
            self.out, self.modules, self.rank, self.patch.parameters, inexact, written_bytes, watch.timing
        )


def plan_export(
    patch: Patch | AnyPath,
    out: AnyPath,
    *,
    base: AnyPath | None = None,
    force: bool = False,
    live: Callable[[Checkpoint | None, Patch], LivePlaces | str] = lambda base, patch: "",
    **options: Unpack[ExportOptions],
) -> ExportPlan:
    """Check everything that `export_lora` needs. ``live`` asks the live model, or says why it cannot."""
    (form,) = split("export_lora", options, ExportOptions)
    dtype, rank = str(form.get("dtype", "f32")).upper(), form.get("rank")
    rank_pattern, prefix = bool(form.get("rank_pattern")), form.get("prefix", "")
    patch = patch if isinstance(patch, Patch) else Patch.load(patch)
    if dtype not in _DTYPES:
        raise UsageError("unknown [[dtype]]", expected="f32, bf16 or f16", found=dtype.lower())
    if rank_pattern and rank is not None:
        raise UsageError("[[rank]] and [[rank_pattern]] do not go together")
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
    model = live(adapted_part(patch, original), patch)
    places, warnings = places_in_files(patch, original, prefix)
    if isinstance(model, str):
        warnings += [model] if model else []
    elif not prefix:
        files, places, warnings = places, dict(model.places), []
        for name, found in places.items():  # what kind of tensor it is, and why that has no LoRA form
            if isinstance(kind := files[name], str) and isinstance(found, str):
                places[name] = f"{kind}: {found}"
    modules = lora_modules(patch, places)
    warnings += other_base(original, patch.base, patch.name)
    if rank_pattern:
        modules = [replace(module, rank=module.count) for module in modules]
    else:
        chosen = _rank(patch, modules, rank)
        modules = [replace(module, rank=chosen) for module in modules]
        if next_step(chosen) != chosen:
            step = next_step(chosen)
            serve = f"serve it with `--max-lora-rank {step}`" if step else "vLLM will not serve it"
            warnings.append(f"{chosen} is not one of vLLM's ranks, {', '.join(map(str, STEPS))}: {serve}")
    others = [f"{module.tensor} ({module.place.form})" for module in modules if module.place.form != "linear"]
    if others:
        warnings.append(f"readers other than PEFT may not know the factors of {some(others, 2)}")
    known = patch.base.label
    if original is not None and original.source.repo is not None:
        known = original.source.repo
    config = adapter_config(modules, known, task_of(original), None if isinstance(model, str) else model)
    plan = ExportPlan(patch, original, modules, dtype, config, Path(out), force, warnings)
    if not isinstance(model, str):
        model.check(config, plan.entries)
    return plan


def _rank(patch: Patch, modules: Sequence[LoraModule], rank: int | None) -> int:
    largest = max(modules, key=lambda module: module.count)
    if rank is not None:
        if rank < largest.count:
            raise UsageError(
                "[[rank]] is too small for this patch",
                file=patch.place,
                tensor=largest.tensor,
                expected=f"at least {largest.count}, the neurons of its largest module",
                found=rank,
            )
        return rank
    step = next_step(largest.count)
    if step is None:
        raise MismatchError(
            "the patch is too large for a LoRA that can be served",
            file=patch.place,
            tensor=largest.tensor,
            expected=f"at most {STEPS[-1]} neurons of one tensor",
            found=largest.count,
            hint="write the patched checkpoint: `neftsurgery apply BASE PATCH -o OUT`; or choose fewer with "
            f"[[max_per_tensor={STEPS[-1]}]]; for PEFT alone, [[rank_pattern]] or [[rank={largest.count}]]",
        )
    return step


class _Factors:
    """Writes the two factors of one module. Elements that are not written are zero."""

    def __init__(
        self, plan: ExportPlan, module: LoraModule, writer: TensorFileWriter, block: int | None
    ) -> None:
        self._block = block
        self._plan, self._module, self._writer = plan, module, writer
        self._first, self._second = module.entries(plan.dtype)
        self._width = prod(module.place.inputs)
        self._rows, self._columns, self._units = module.slots()

    def write(self) -> int:
        """Write both; returns how many elements do not round back."""
        return self._write_rows() if self._module.place.rows else self._write_columns()

    def _write_rows(self) -> int:
        """Differences as rows of ``A``, ones in ``B``."""
        inexact = 0
        for start, differences, lost in self._differences(0, self._width):
            rows = self._rows[start : start + len(differences)]
            ends = [*np.flatnonzero(np.diff(rows) != 1) + 1, len(rows)]  # of ranges that lie side by side
            for low, high in zip([0, *ends], ends, strict=False):
                self._write(self._first, int(rows[low]), differences[low:high])
            inexact += lost
        for unit in np.unique(self._units).tolist():
            self._write(self._second, unit, _ones(self._columns[self._units == unit], self._second.shape[1]))
        return inexact

    def _write_columns(self) -> int:
        """Ones in ``A``, differences as columns of ``B``."""
        for row, unit in zip(self._rows.tolist(), self._units, strict=True):
            self._write(self._first, row, _ones(unit, self._width))
        inexact, (outputs, rank, *_) = 0, self._second.shape
        step = max(1, (self._block or _CHUNK_BYTES) // ((4 if self._second.dtype == "F32" else 32) * rank))
        for low in range(0, outputs, step):
            high = min(low + step, outputs)
            filled = np.zeros((high - low, rank), np.float32)
            for start, differences, lost in self._differences(low, high):
                filled[:, self._columns[start : start + len(differences)]] = differences.T
                inexact += lost
            self._write(self._second, low, filled)
        return inexact

    def _write(self, entry: TensorInfo, row: int, values: NDArray[Any]) -> None:
        short = entry.dtype != "F32"
        self._writer.write(entry.name, row, narrow(values, entry.dtype) if short else values.astype("f4"))

    def _differences(self, low: int, high: int) -> Iterator[tuple[int, NDArray[np.float64], int]]:
        """Elements ``low`` to ``high`` of the differences of all neurons, in batches.

        Of each batch: the position of its first neuron, its differences, rounded to the factors' dtype, and
        how many of their elements do not round back.
        """
        patch, base, position = self._plan.patch, self._plan.base, 0
        for name in self._module.parts:
            tensor = patch.tensors[name]
            dtype, size = tensor.info.dtype, tensor.info.type.itemsize
            part, here = slice(low * size, high * size), self._module.parts[name].index >= 0
            step = max(1, _BATCH_BYTES // (part.stop - part.start))
            for start, stop in tensor.blocks(self._block):
                values = patch.values(name, start, stop)[:, part]
                replaced = replaced_rows(patch, base, name, start, stop)[:, part]
                for first in range(0, stop - start, step):
                    kept = first + np.flatnonzero(here[start + first : min(start + first + step, stop)])
                    new, old = (widen(rows[kept], dtype) for rows in (values, replaced))
                    differences = self._rounded(new - old, name)
                    inexact = int(np.count_nonzero(self._sum(old, differences, dtype) != new))
                    yield position, differences, inexact
                    position += len(kept)

    def _rounded(self, differences: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        rounded = widen(narrow(differences, self._plan.dtype), self._plan.dtype)
        if not np.isfinite(rounded).all():
            raise MismatchError(
                "a difference is infinite or NaN: a product would spread it over the whole weight",
                file=self._plan.patch.place,
                tensor=name,
                hint="write the patched checkpoint instead: `neftsurgery apply`"
                + (", or use [[dtype=f32]]" if self._plan.dtype == "F16" else ""),
            )
        return rounded

    def _sum(
        self, old: NDArray[np.float64], differences: NDArray[np.float64], dtype: str
    ) -> NDArray[np.float64]:
        """What merging gives. PEFT rounds differences of embeddings and parameters before it adds."""
        with np.errstate(over="ignore"):
            if self._module.place.form in ("embedding", "parameter"):
                differences = widen(narrow(differences, dtype), dtype)
            wide = np.float64 if dtype == "F64" else np.float32
            added = old.astype(wide) + differences.astype(wide)
        return widen(narrow(added, dtype), dtype)


def _ones(where: IndexArray | int, size: int) -> NDArray[np.float64]:
    row = np.zeros((1, size))
    row[0, where] = 1
    return row
