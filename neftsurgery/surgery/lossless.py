"""extract, lossless: a whole tuned checkpoint as its difference from a base, block by block."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, Unpack

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.adapter import open_pair
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.in_memory import TensorsInMemory
from ..coding.blocks import encode, encode_fast
from ..coding.compression import compress
from ..coding.elements import BLOCK, Carrier
from ..coding.fitting import fit, fit_memory
from ..coding.tables import MOST_TABLES, FrequencyTable, pack
from ..errors import MismatchError, UsageError
from ..options import OutputOptions, RunOptions
from ..patch.delta import (
    ARRAYS,
    DeltaBlock,
    SideFile,
    block_hash,
    block_state,
    blocks_of,
    counterpart,
    pack_layout,
    read_block,
)
from ..patch.lossless import LosslessPatch
from ..patch.patch_file import PATCH_VERSION, sealed
from ..progress import Progress, Stopwatch, silent
from ..storage.output_checks import AnyPath, refuse_output
from ..storage.threads import Limits, in_order
from ..tensors.dtypes import DTYPES
from ..tensors.header import TensorInfo
from ..tensors.writer import TensorFileWriter, written_file
from ..version import __version__
from .model_files import ModelFiles

_SIDE_LEVEL = 10
#: Blocks of a kind of tensor that its table is made from: more where they hold few changes, up to a quarter.
_SAMPLES, _MOST_SAMPLES = 3, 12
_MANY_CHANGES = 1 << 17
#: Kinds of tensor with fewer changes share a table: one of their own would cost more than it saves.
_FEW_CHANGES = 4096
#: Bytes that a thread holds: a block of either side, its symbols, its code.
_BLOCK_MEMORY = 48 << 20

_Pair: TypeAlias = tuple[Carrier, Carrier]  # a block of the source, and the same of the target


class CodingOptions(OutputOptions, total=False):
    """What a lossless patch is to hold, and where it is written: keywords of `extract`."""

    reversible: bool
    fast: bool
    weights_only: bool


class CodingAndRun(CodingOptions, RunOptions):
    """The keywords of a lossless `extract`."""


@dataclass(frozen=True)
class LosslessPlan:
    """What would be written. Made by `plan_lossless`; nothing is written yet."""

    base: ModelFiles
    tuned: ModelFiles
    reversible: bool = False
    fast: bool = False
    weights_only: bool = False
    out: AnyPath | None = None
    force: bool = False
    warnings: Sequence[str] = ()

    def describe(self) -> dict[str, object]:
        """For ``--dry-run`` and JSON."""
        return {
            "lossless": True,
            "base": self.base.weights.name,
            "tuned": self.tuned.weights.name,
            "tensors": len(self.tuned.weights.tensors),
            "files": [file.name for file in self.tuned.files],
            "side_files": list(self.tuned.side),
            "not_carried": list(self.tuned.not_carried),
            "tuned_bytes": self.tuned.nbytes,
            "reversible": self.reversible,
            "fast": self.fast,
            "out": None if self.out is None else str(self.out),
        }

    def run(self, *, limits: Limits | None = None, progress: Progress = silent) -> LosslessPatch:
        """Code every block, and write the patch."""
        limits = limits or Limits.of()
        if limits.executor is not None:
            hint = "one process codes a lossless patch: leave it out"
            raise UsageError("[[executor]] does not go with [[lossless]]", hint=hint)
        with Stopwatch() as watch:
            ways = [_Way("forward", self.base, self.tuned, self.fast, limits)]
            if self.reversible:
                ways.append(_Way("backward", self.tuned, self.base, self.fast, limits))
            manifest = self._manifest()
            most = sum(block.nbytes for way in ways for block in way.blocks)
            entries = [entry for way in ways for entry in way.entries()]
            entries.append(TensorInfo("code", "U8", (most,)))
            with (
                progress("coding", most) as advance,
                written_file(entries, sealed(manifest, ()), self.out, force=self.force, space=0) as written,
            ):
                end = 0
                for way in ways:
                    end = way.code(written, end, limits, advance)
                written.shrink("code", end)
                written.finish(sealed(manifest, [part for way in ways for part in way.write(written)]))
                for model in (self.base, self.tuned):
                    model.weights.check_unchanged()
        patch = LosslessPatch(written.reader())
        watch.bytes_read = self.base.weights.bytes_read + self.tuned.weights.bytes_read
        patch.timing = watch.timing
        return patch

    def _manifest(self) -> dict[str, object]:
        return {
            "version": PATCH_VERSION,
            "kind": LosslessPatch.kind,
            "base": self.base.origin().to_json(),
            "tuned": self.tuned.origin().to_json(),
            "created_by": f"neftsurgery {__version__}",
            "reversible": self.reversible,
            "fast": self.fast,
            "weights_only": self.weights_only,
            "not_carried": list(self.tuned.not_carried),
            "tensors": {},
        }


def plan_lossless(
    base: AnyPath | Mapping[str, Any],
    tuned: AnyPath | Mapping[str, Any],
    **options: Unpack[CodingOptions],
) -> LosslessPlan:
    """Check everything that a lossless `extract` needs; nothing is written. Raises as `extract`."""
    sides = _opened(base, tuned)
    models = [ModelFiles.of(side) for side in sides]
    inputs = [side.source.path for side in sides if isinstance(side, Checkpoint)]
    return plan_between(models[0], models[1], inputs, **options)


def plan_between(
    base: ModelFiles, tuned: ModelFiles, inputs: Sequence[Path], **options: Unpack[CodingOptions]
) -> LosslessPlan:
    """As `plan_lossless`, of two models; ``inputs``: files and folders that ``out`` must not replace."""
    if not any(counterpart(info, base.weights.tensors) for info in tuned.weights.tensors.values()):
        raise MismatchError(
            "the checkpoints have no tensor in common", file=tuned.weights.name, hint="are they of one model?"
        )
    plan = LosslessPlan(base, tuned, **options)
    place = refuse_output(plan.out, inputs=inputs, force=plan.force, kind="file")
    if plan.weights_only:
        base, tuned = base.without_side(), tuned.without_side()
    return replace(plan, base=base, tuned=tuned, out=place)


def _opened(
    base: AnyPath | Mapping[str, Any], tuned: AnyPath | Mapping[str, Any]
) -> tuple[Checkpoint, Checkpoint] | tuple[TensorsInMemory, TensorsInMemory]:
    if isinstance(base, Mapping) or isinstance(tuned, Mapping):
        if not (isinstance(base, Mapping) and isinstance(tuned, Mapping)):
            raise UsageError("tensors in memory and files are not compared", hint="give two of one kind")
        return TensorsInMemory(base, "base"), TensorsInMemory(tuned, "tuned")
    first, second = open_pair(base, tuned)
    if not isinstance(second, Checkpoint):
        raise UsageError(
            "an adapter has no weights of its own",
            file=second.name,
            hint="merge it into a checkpoint first, with PEFT's merge_and_unload",
        )
    for checkpoint in (first, second):
        names = () if checkpoint.is_file else tuple(shard.name for shard in checkpoint.shards)
        if any("/" in shard.name[len(shard.part) :] for shard in checkpoint.shards):
            raise UsageError("a lossless patch holds weight files of one folder only", file=checkpoint.name)
        if not all(name.endswith(".safetensors") for name in names):
            raise UsageError("a weight file of the folder does not end in .safetensors", file=checkpoint.name)
    return first, second


class _Way:
    """The coding of one checkpoint as its difference from another."""

    def __init__(
        self, prefix: str, source: ModelFiles, target: ModelFiles, fast: bool, limits: Limits
    ) -> None:
        self._prefix, self._fast = prefix, fast
        self._source, self._target = source.weights, target.weights
        self.blocks = tuple(blocks_of(target.files))
        self._table_of, self._tables = ({}, []) if fast else self._fitted(limits)
        described, side = _packed(target, source)
        layout = pack_layout(target.files, described, single=target.single)
        parts = {"layout": layout, "tables": pack(self._tables), "side": side}
        self._arrays: dict[str, NDArray[np.unsignedinteger]] = {
            name: np.zeros(len(self.blocks), DTYPES[dtype].numpy) for name, dtype in ARRAYS.items()
        } | {name: np.frombuffer(content, np.uint8) for name, content in parts.items()}

    def entries(self) -> Iterator[TensorInfo]:
        """The entries of the file, its code left out."""
        for name, array in self._arrays.items():
            yield TensorInfo(f"{self._prefix}:{name}", ARRAYS.get(name, "U8"), array.shape)

    def code(
        self, writer: TensorFileWriter, start: int, limits: Limits, advance: Callable[[int], None]
    ) -> int:
        """Code and write all blocks from byte ``start`` of the code; returns where it ends."""
        end = start
        for block, (code, facts) in in_order(self._coded, self.blocks, limits.workers(_BLOCK_MEMORY)):
            writer.write("code", end, np.frombuffer(code, np.uint8))
            end += len(code)
            for name, fact in facts.items():
                self._arrays[name][block.number] = fact
            advance(block.nbytes)
        return end

    def write(self, writer: TensorFileWriter) -> Iterator[tuple[str, bytes]]:
        """Write all entries but the code; yields each, for their hash."""
        for name, array in self._arrays.items():
            writer.write(f"{self._prefix}:{name}", 0, array)
            yield f"{self._prefix}:{name}", array.tobytes()

    def _read(self, block: DeltaBlock) -> tuple[Carrier | None, Carrier, int]:
        """A block of both sides, and the hash of what the source has of it."""
        base, before, _ = block_state(self._source, block)
        return base, read_block(self._target, block), before

    def _coded(self, block: DeltaBlock) -> tuple[bytes, dict[str, int]]:
        """The code of a block, and what `ARRAYS` hold of it."""
        base, tuned, before = self._read(block)
        number = self._table_of.get(block.info.name)
        if self._fast:
            form, code = encode_fast(base, tuned)
            changed = len(tuned) if base is None else int(np.count_nonzero(base != tuned))
        else:
            table = None if number is None else self._tables[number]
            form, code, changed = encode(base, tuned, block.elements, table)
        facts = {"form": int(form), "table": number or 0, "size": len(code), "changed": changed}
        return code, facts | {"before": before, "after": block_hash(tuned)}

    def _fitted(self, limits: Limits) -> tuple[Mapping[str, int], list[FrequencyTable]]:
        """A table for each kind of tensor, from a sample of its blocks; kinds with few changes share one."""
        kinds: dict[tuple[str, str, bool], list[DeltaBlock]] = {}
        for block in self.blocks:
            new = counterpart(block.info, self._source.tensors) is None
            kinds.setdefault((re.sub(r"\d+", "*", block.info.name), block.info.dtype, new), []).append(block)
        table_of, tables = dict[str, int](), list[FrequencyTable]()
        small: dict[str, tuple[list[DeltaBlock], list[_Pair]]] = {}

        def fitted(blocks: Sequence[DeltaBlock]) -> tuple[_Pair, FrequencyTable | None]:
            pairs, changes = self._sample(blocks, _SAMPLES)
            if changes < _MANY_CHANGES and _most_samples(blocks) > _SAMPLES:
                pairs, changes = self._sample(blocks, _most_samples(blocks))
            share = _share(pairs, blocks)
            few = changes < _FEW_CHANGES * share
            return pairs[0], None if few else fit(pairs, blocks[0].elements, share)

        def add(blocks: Sequence[DeltaBlock], table: FrequencyTable) -> None:
            table_of.update((block.info.name, len(tables)) for block in blocks)
            tables.append(table)

        largest = [fit_memory(_most_samples(kind), max(b.nbytes for b in kind)) for kind in kinds.values()]
        workers = limits.workers(max(largest, default=0))
        for blocks, (pair, table) in in_order(fitted, kinds.values(), workers):
            if table is not None and len(tables) < MOST_TABLES - len(DTYPES):
                add(blocks, table)
                continue
            group = small.setdefault(blocks[0].info.dtype, ([], []))
            group[0].extend(blocks)
            if sum(len(tuned) for _, tuned in group[1]) < _SAMPLES * BLOCK:  # what is held is bounded
                group[1].append(pair)
        for blocks, pairs in small.values():
            add(blocks, fit(pairs, blocks[0].elements, _share(pairs, blocks)))
        return table_of, tables

    def _sample(self, blocks: Sequence[DeltaBlock], count: int) -> tuple[list[_Pair], int]:
        """At most ``count`` of the blocks, evenly spread, and how many of their elements change."""
        chosen = np.unique(np.linspace(0, len(blocks) - 1, count).astype(int))
        read = (self._read(blocks[i]) for i in chosen)
        pairs = [(np.zeros_like(tuned) if base is None else base, tuned) for base, tuned, _ in read]
        return pairs, sum(int(np.count_nonzero(base != tuned)) for base, tuned in pairs)


def _most_samples(blocks: Sequence[DeltaBlock]) -> int:
    return max(_SAMPLES, min(_MOST_SAMPLES, len(blocks) // 4))


def _share(pairs: Sequence[_Pair], blocks: Sequence[DeltaBlock]) -> float:
    """What part of the elements of ``blocks`` is in ``pairs``."""
    return sum(len(tuned) for _, tuned in pairs) / sum(map(len, blocks))


def _packed(target: ModelFiles, source: ModelFiles) -> tuple[list[SideFile], bytes]:
    """Side files as a patch holds them: described, and compressed; nothing of what the source has too."""
    described, parts = list[SideFile](), list[bytes]()
    for name, read in target.side.items():
        content = read()
        same = len(content) > 0 and name in source.side and source.side[name]() == content
        parts.append(b"" if same else compress(content, _SIDE_LEVEL))
        digest = hashlib.sha256(content).hexdigest()
        described.append(SideFile(name, len(content), digest, len(parts[-1])))
    return described, b"".join(parts)
