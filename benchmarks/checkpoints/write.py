"""Writes a model's files: base, and tuned, which is base plus a little noise everywhere.

The files are written without a library, since a benchmark must not depend on what it measures. A block of a
few megabytes of numbers is repeated: readers cannot tell, and writing is much faster.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.checkpoints.shapes import BF16, Model, Shape

Side = Literal["base", "tuned"]
BLOCK = (1 << 24) + 4_321  # elements; not a multiple of a row, so that rows of a tensor differ
STRIDE = 6_700_417  # offset in the block from one tensor's start to the next one's, so that tensors differ
SPREAD, CHANGE = 0.02, 1e-4  # standard deviations of the weights, and of what the fine-tune adds
SPARSE_DATA = 1 << 20  # bytes of numbers at the start of a sparse tensor; the rest is a hole


def write_pair(folder: Path, model: Model, shards: int = 1, sparse: bool = False) -> None:
    """Writes ``folder/base`` and ``folder/tuned``, synced to the disk."""
    for side in ("base", "tuned"):
        write_side(folder / side, model, block(side), shards, sparse)


def block(side: Side) -> memoryview:
    """The bytes of ``BLOCK`` bf16 numbers."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal(BLOCK, np.float32)
    values *= SPREAD
    if side == "tuned":
        values += CHANGE * generator.standard_normal(BLOCK, np.float32)
    return memoryview(_bf16(values)).cast("B")


def write_side(folder: Path, model: Model, source: memoryview, shards: int, sparse: bool) -> None:
    """Writes one checkpoint folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config, indent=1))
    weight_map: dict[str, str] = {}
    numbers = {name: number for number, name in enumerate(model.tensors)}
    for file, tensors in _deal(model.tensors, shards):
        weight_map |= dict.fromkeys(tensors, file)
        with open(folder / file, "wb") as stream:
            _write_shard(stream, tensors, numbers, source, sparse)
    if shards > 1:
        index = {"metadata": {"total_size": model.nbytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _deal(tensors: dict[str, Shape], shards: int) -> Iterator[tuple[str, dict[str, Shape]]]:
    """File names and their tensors: neighbours stay together, no shard is empty."""
    if shards > len(tensors):
        raise ValueError(f"{len(tensors)} tensors do not fill {shards} shards")
    names = list(tensors)
    cuts = [len(names) * number // shards for number in range(shards + 1)]
    for number, (start, stop) in enumerate(pairwise(cuts), 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        yield file, {name: tensors[name] for name in names[start:stop]}


def _write_shard(
    stream: BinaryIO, tensors: dict[str, Shape], numbers: dict[str, int], source: memoryview, sparse: bool
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        end = position + BF16 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name, shape in tensors.items():
        size = BF16 * math.prod(shape)
        data = min(size, SPARSE_DATA) if sparse else size
        for piece in _pieces(source, BF16 * (numbers[name] * STRIDE % BLOCK), data):
            stream.write(piece)
        stream.seek(size - data, os.SEEK_CUR)
    stream.truncate()
    stream.flush()
    os.fsync(stream.fileno())


def _pieces(source: memoryview, start: int, size: int) -> Iterator[memoryview]:
    """``size`` bytes of ``source`` from ``start`` on; continues at its start when it ends."""
    while size:
        piece = source[start : start + size]
        yield piece
        size -= len(piece)
        start = 0


def _bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to the nearest, halves up. torch rounds ties to even; the difference does not matter here."""
    bits = values.view(np.uint32)
    bits += 0x8000
    return (bits >> 16).astype(np.uint16)
