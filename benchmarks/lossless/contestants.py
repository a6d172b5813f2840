"""The contestants: each packs a fine-tune, with its base at hand or without, and unpacks it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.process import run
from benchmarks.lossless.pairs import Pair

SLOW_BYTES = 64_000_000  # slow contestants run on smaller files, once


@dataclass(frozen=True)
class Place:
    """The files that contestants write."""

    packed: Path
    out: Path

    @classmethod
    def within(cls, folder: Path) -> Place:
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder / "packed.safetensors", folder / "out.safetensors")


@dataclass(frozen=True)
class Contestant:
    """``encode`` and ``decode`` are measured. Contestants in memory return what they make."""

    name: str
    role: str  # ours, limit, rival
    encode: Callable[[], Any]
    decode: Callable[[Any], Any]
    skipped: str | None = None
    slow: bool = False
    memory: bool = False


def contestants(pair: Pair, place: Place) -> Iterator[Contestant]:
    """Those that work on files, and then those in memory, where all that they read is beforehand."""
    for fast in (False, True):
        encode, decode = partial(_extract, pair, place, fast), partial(_apply, pair, place)
        yield Contestant(_ours(fast), "ours", encode, decode)
    yield _zstd("zstd -3 --patch-from", pair, place, "-3", patch=True)
    yield _zstd("zstd -19 --patch-from", pair, place, "-19", patch=True)
    yield _xdelta(pair, place)
    yield _zipnn("ZipNN of the XOR with the base", pair, place, _ZIPNN_XOR)
    yield _zipnn("ZipNN", pair, place, _ZIPNN)
    yield _zstd("zstd -3", pair, place, "-3")
    yield _zstd("zstd -1", pair, place, "-1")
    there = ["cp", str(pair.tuned), str(place.packed)]
    back = ["cp", str(place.packed), str(place.out)]
    yield Contestant("cp", "limit", partial(run, there), lambda _: run(back))
    yield from _in_memory(pair)


def _ours(fast: bool) -> str:
    return "neftsurgery --fast" if fast else "neftsurgery"


def _extract(pair: Pair, place: Place, fast: bool) -> None:
    import neftsurgery as ns

    ns.extract(pair.base, pair.tuned, lossless=True, fast=fast, out=place.packed, force=True, threads=1)


def _apply(pair: Pair, place: Place, _: object) -> None:
    import neftsurgery as ns

    ns.apply(pair.base, place.packed, out=place.out, force=True, threads=1)


def _zstd(name: str, pair: Pair, place: Place, level: str, *, patch: bool = False) -> Contestant:
    more = ["--long=31", f"--patch-from={pair.base}"] if patch else []
    words = ["zstd", "-q", "-f", *more]
    encode = [*words, level, str(pair.tuned), "-o", str(place.packed)]
    decode = [*words, "-d", str(place.packed), "-o", str(place.out)]
    absent = None if shutil.which("zstd") else "the program is not there"
    slow = level == "-19"
    return Contestant(name, "rival", partial(run, encode), lambda _: run(decode), absent, slow)


_Bytes = Callable[[bytes, bytes, str], Any]  # the base, the tuned or packed content, the dtype


def _xdelta(pair: Pair, place: Place) -> Contestant:
    base, tuned, packed, out = map(str, (pair.base, pair.tuned, place.packed, place.out))

    def encode() -> None:
        import pyxdelta

        if not pyxdelta.run(base, tuned, packed):
            raise RuntimeError("no delta")

    def decode(_: object) -> None:
        import pyxdelta

        if not pyxdelta.decode(base, packed, out):
            raise RuntimeError("no file")

    absent = None if find_spec("pyxdelta") else "not installed: pyxdelta"
    return Contestant("xdelta3", "rival", encode, decode, absent, slow=True)


def _zipnn(name: str, pair: Pair, place: Place, ways: tuple[_Bytes, _Bytes]) -> Contestant:
    """ZipNN works on bytes in memory; they come from files and go to files, as those of the others."""

    def through(way: _Bytes, source: Path, target: Path) -> None:
        target.write_bytes(way(pair.base.read_bytes(), source.read_bytes(), pair.dtype))

    encode = partial(through, ways[0], pair.tuned, place.packed)
    decode = partial(through, ways[1], place.packed, place.out)
    absent = None if find_spec("zipnn") else "not installed: zipnn"
    return Contestant(name, "rival", encode, lambda _: decode(), absent)


def _xor(a: bytes, b: bytes) -> np.ndarray:
    """Of bytes of the same length, but for headers, which lie in front."""
    count = min(len(a), len(b))
    found = np.frombuffer(b, np.uint8).copy()
    found[len(b) - count :] ^= np.frombuffer(a, np.uint8)[len(a) - count :]
    return found


def _coder(dtype: str) -> Any:
    import zipnn

    kinds = {"bf16": "bfloat16", "f32": "float32"}
    return zipnn.ZipNN(input_format="byte", bytearray_dtype=kinds[dtype], threads=1)


_ZIPNN: tuple[_Bytes, _Bytes] = (
    lambda _, content, dtype: _coder(dtype).compress(bytearray(content)),
    lambda _, content, dtype: _coder(dtype).decompress(content),
)
_ZIPNN_XOR: tuple[_Bytes, _Bytes] = (
    lambda base, content, dtype: _coder(dtype).compress(bytearray(_xor(base, content))),
    lambda base, content, dtype: _xor(base, _coder(dtype).decompress(content)),
)


def _in_memory(pair: Pair) -> Iterator[Contestant]:
    from safetensors.torch import load_file

    import neftsurgery as ns

    before, after = load_file(pair.base), load_file(pair.tuned)
    raw = {name: value.view(-1).view(torch.uint8).numpy() for name, value in before.items()}
    room = {name: np.zeros_like(value) for name, value in raw.items()}

    def decode(patch: Any) -> dict[str, np.ndarray]:
        """The blocks of the base are checked, those of the result too, as by apply and apply_live."""
        from neftsurgery.patch.delta import block_hash

        delta = patch.forward
        for block in delta.blocks:
            kind = block.elements.carrier
            source, target = (side[block.info.name].view(kind) for side in (raw, room))
            source, target = source[block.start : block.stop], target[block.start : block.stop]
            if block_hash(source) != int(delta.before[block.number]):
                sys.exit("another base")
            target[...] = delta.decoded(block, source)
        return room

    for fast in (False, True):
        encode = partial(ns.extract, before, after, lossless=True, fast=fast, threads=1)
        yield Contestant(f"{_ours(fast)}, in memory", "ours", encode, decode, memory=True)
    content = pair.tuned.read_bytes()
    for level in (3, 1):
        yield _zstd_library(level, content)
    whole, copied = np.frombuffer(content, np.uint8), np.zeros(len(content), np.uint8)

    def copy(_: object = None) -> np.ndarray:
        np.copyto(copied, whole)
        return copied

    yield Contestant("memcpy", "limit", copy, copy, memory=True)


def _zstd_library(level: int, content: bytes) -> Contestant:
    absent = None if find_spec("zstandard") else "not installed: zstandard"

    def encode() -> bytes:
        import zstandard

        return bytes(zstandard.ZstdCompressor(level=level).compress(content))

    def decode(packed: bytes) -> bytes:
        import zstandard

        return bytes(zstandard.ZstdDecompressor().decompress(packed))

    return Contestant(f"zstd -{level}, in memory", "rival", encode, decode, absent, memory=True)
