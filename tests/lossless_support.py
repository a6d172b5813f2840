"""What tests of lossless patches are made with: pairs of checkpoints, and files compared with each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from support import raw_file, snapshot

#: Bits of an element of every dtype of safetensors.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32,
    "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

Tensor = tuple[str, tuple[int, ...], bytes]
Tensors = dict[str, Tensor]


def tensor(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """Random bits."""
    return dtype, shape, rng.bytes(int(np.prod(shape)) * BITS[dtype] // 8)


def touched(one: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """A ``share`` of the bytes changed."""
    data = np.frombuffer(one[2], np.uint8)
    return (*one[:2], np.where(rng.random(len(data)) < share, data ^ 1, data).astype(np.uint8).tobytes())


def folder(
    path: Path,
    tensors: Tensors,
    shards: int = 1,
    files: dict[str, bytes] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A checkpoint folder, with ``files`` beside the weights; tensors dealt round to ``shards``."""
    path.mkdir(parents=True)
    for name, content in (files or {}).items():
        (path / name).write_bytes(content)
    parts = [[(n, d, list(s), b) for n, (d, s, b) in list(tensors.items())[k::shards]] for k in range(shards)]
    if shards == 1:
        raw_file(path / "model.safetensors", parts[0], metadata)
        return path
    names = [f"model-{k + 1:05}-of-{shards:05}.safetensors" for k in range(shards)]
    weight_map = {}
    for name, part in zip(names, parts, strict=True):
        raw_file(path / name, part, metadata)
        weight_map |= {one[0]: name for one in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def contents(path: Path) -> dict[str, str]:
    """The hash of a file, or of each file in a folder, by name; modes left out."""
    return {name: digest for name, (_, digest) in snapshot(path).items()}


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    """Nothing in these folders changes, and no file is left in them."""
    before = [snapshot(path) for path in paths]
    yield
    assert [snapshot(path) for path in paths] == before


class Counted:
    """A progress that keeps what it was told: for each stage its total, and the sum of its steps."""

    def __init__(self) -> None:
        self.stages: dict[str, list[int]] = {}

    @contextmanager
    def __call__(self, what: str, total: int, unit: str = "B") -> Iterator[Callable[[int], None]]:
        stage = self.stages[what] = [total, 0]

        def advance(done: int) -> None:
            assert done >= 0
            stage[1] += done

        yield advance
