"""The readers of patches, of both kinds, and of coded blocks; what they accept is compared with an oracle."""

from __future__ import annotations

import itertools
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import zstandard
from coding.pairs import changed, weights
from lossless_support import Tensors, folder
from safetensors import deserialize
from support import as_version_1, assert_same_tensors, patch_rows, patched_by_hand, raw_read

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.provenance import fingerprint
from neftsurgery.coding.blocks import Form, decode, encode
from neftsurgery.coding.compression import compress
from neftsurgery.coding.elements import Carrier, Elements
from neftsurgery.coding.fitting import fit
from neftsurgery.coding.tables import pack, unpack
from neftsurgery.errors import CorruptFileError, MismatchError
from neftsurgery.patch.delta import Delta, DeltaBlock, block_hash, block_state
from neftsurgery.patch.lossless import LosslessPatch
from neftsurgery.patch.patch import Patch
from neftsurgery.sources.resolve import resolve

from .coded_oracle import MOST_ELEMENTS, expected
from .forge import mutate_lossless, mutate_neurons
from .mutate import mutate_bytes
from .target import Target

__all__ = ["patch_targets"]

#: Exit 4, and exit 3 for a patch that is for another base.
REFUSALS = (CorruptFileError, MismatchError)
#: One in so many inputs goes through whole verbs, which take longer than their reading.
VERBS = 128
_FILE = "model.safetensors"

Pair: TypeAlias = tuple[Path, Path]


def patch_targets(root: Path) -> Iterator[Target]:
    """The readers of patches, with their files in ``root``."""
    _compile_kernels()
    pairs = [_pair(root / f"pair.{number}", number) for number in range(3)]
    made = []
    for number, options in ((0, {"reversible": True}), (0, {"fast": True}), (1, {}), (2, {})):
        made.append((root / f"lossless.{len(made)}", pairs[number]))
        ns.extract(*pairs[number], lossless=True, out=made[-1][0], **options).close()
    seeds = [path.read_bytes() for path, _ in made]
    lossless = _read_lossless(root, pairs)
    yield Target("lossless patch", root / "a-lossless-patch", seeds, mutate_lossless, lossless, 0.5, REFUSALS)
    yield _block_target(root, [(path, pair[0]) for path, pair in made])
    few = [root / f"neurons.{number}" for number in range(3)]
    common = {"include": ["*"], "axis": {"b.*": 1}}
    ns.extract(*pairs[1], neurons=9, reversible=True, score="changed", out=few[0], **common).close()
    ns.extract(*pairs[1], changed=True, with_bias=True, out=few[1], **common).close()
    shutil.copyfile(few[0], few[2])
    as_version_1(few[2])
    seeds = [path.read_bytes() for path in few]
    neurons = _read_neurons(root, pairs[1][0])
    yield Target("patch", root / "a-patch", seeds, mutate_neurons, neurons, 1.5, REFUSALS)


def _compile_kernels() -> None:
    """For every width of elements: a hostile file must not be the first that needs one."""
    rng = np.random.default_rng(0)
    for dtype in ("U8", "F16", "F32", "F64"):
        elements, before = Elements.of(dtype), weights(dtype, 500, rng)
        for share in (0.1, 1.0):
            after = changed(dtype, before, share, "steps", rng)
            (table,) = unpack(pack([fit([(before, after)], elements)]), 1)
            form, code, *_ = encode(before, after, elements, table)
            decode(form, code, before, np.empty_like(after), elements, table)
            assert form == Form.CODED


#: By pair, each tensor of its base: name, dtype, shape, and what share of it is changed how.
_TENSORS = (
    [("a.sparse.weight", "BF16", (16, 24), 0.15, "steps"), ("c.few.weight", "F16", (8, 16), 0.01, "odd")],
    [("b.dense.weight", "F32", (6, 16), 1.0, "steps"), ("f.noise", "U8", (64,), 1.0, "noise")],
    [("d.wide", "F64", (20,), 1.0, "odd"), ("e.same", "I8", (40,), 0.0, "steps")],
)


def _pair(root: Path, number: int) -> Pair:
    """A small checkpoint and a changed one. The differences of all pairs have every form and width."""
    rng = np.random.default_rng(number)
    base, tuned = Tensors(), Tensors()
    for name, dtype, shape, share, how in _TENSORS[number]:
        before = weights(dtype, int(np.prod(shape)), rng)
        base[name] = dtype, shape, before.tobytes()
        tuned[name] = dtype, shape, changed(dtype, before, share, how, rng).tobytes()
    files = {}
    if number == 0:
        tuned["c.few.weight"] = "F16", (9, 16), tuned["c.few.weight"][2] + rng.bytes(32)  # a row more
        base["h.gone"] = "U8", (9,), bytes(9)
        files = {"config.json": b'{"model_type": "?"}', "vocab.txt": b"a b c"}
    else:
        tuned["g.new"] = "U8", (100,), bytes(100)
    first = folder(root / "before", base, 1, files)
    second = folder(root / "after", tuned, 1, files | {"vocab.txt": b"a b c d" * 5} if files else None)
    return (first / _FILE, second / _FILE) if number == 1 else (first, second)


# --- lossless patches


def _read_lossless(root: Path, pairs: Sequence[Pair]) -> Callable[[bytes], None]:
    path, out, done = root / "a-lossless-patch", root / "made", itertools.count()
    known = {}
    for pair in pairs:
        opened = [Checkpoint.read(resolve(side)) for side in pair]
        known[fingerprint(opened[0])] = (
            pair[0],
            [(one, raw_read(side)) for one, side in zip(opened, pair, strict=True)],
        )
    side = (pairs[0][0] / "config.json").read_bytes()

    def read(raw: bytes) -> None:
        with LosslessPatch.load(path) as patch:
            assert all((str(patch), repr(patch), patch.kinds() is not None, patch.forms() is not None))
            found = known.get(str(patch.base.fingerprint))
            if found is None:
                raise MismatchError("the patch is of another base")
            code, start = bytes(dict(deserialize(raw))["code"]["data"]), 0
            for delta, source in zip((patch.forward, patch.backward), found[1], strict=True):
                if delta is not None:
                    _check_blocks(delta, code[start:], *source)
                    start = delta.code_end
            for one in patch.forward.side:
                patch.forward.side_content(one, lambda: side)
            if next(done) < 8 or zlib.crc32(raw) % VERBS == 0:  # the first ones are valid
                ns.verify(found[0], patch)
                _check_verb(patch, found[0], out)

    return read


def _check_blocks(
    delta: Delta, code: bytes, source: Checkpoint, elements: dict[str, tuple[str, Carrier]]
) -> None:
    """Decode all blocks; the oracle must agree, also where one is refused."""
    starts = np.cumsum(delta.sizes) - delta.sizes
    for block in delta.blocks:
        number = block.number
        found, state, _ = block_state(source, block)
        if state != int(delta.before[number]):
            raise MismatchError("the patch was made from another checkpoint")
        wanted = None
        small = block.stop - block.start <= MOST_ELEMENTS
        if small and delta.sizes[number] <= block.nbytes:
            part = code[int(starts[number]) :][: int(delta.sizes[number])]
            wanted = _wanted(delta, block, part, elements.get(block.info.name))
        try:
            made = delta.decoded(block, found)
        except CorruptFileError:
            assert wanted is None or block_hash(wanted) != int(delta.after[number]), "it is right"
            raise
        assert not small or (wanted is not None and made.tobytes() == wanted.tobytes()), "it is wrong"


def _wanted(
    delta: Delta, block: DeltaBlock, code: bytes, source: tuple[str, Carrier] | None
) -> Carrier | None:
    """A block by the specification."""
    info, size, base = block.info, block.elements.size, None
    if source is not None and (source[0], source[1].ndim) == (info.dtype, len(info.shape)):
        there = source[1].tobytes()[block.start * size : block.stop * size]
        if there and source[1].shape[1:] == info.shape[1:]:
            base = there.ljust(block.nbytes, b"\0")
    form = int(delta.forms[block.number])
    table = delta.tables[int(delta.table_of[block.number])] if form == Form.CODED else None
    found = expected(info.dtype, base, block.nbytes, form, code, table)
    return None if found is None else np.frombuffer(found, block.elements.carrier)


def _check_verb(patch: LosslessPatch, base: Path, out: Path) -> None:
    """`apply` writes the files that the patch says, of the blocks that it holds."""
    _remove(out)
    ns.apply(base, patch, out=out)
    for file in patch.forward.files:
        found = (out if patch.forward.single else out / file.name).read_bytes()
        assert found.startswith(file.start)
        assert len(found) == file.nbytes
    for block in patch.forward.blocks:
        found = (out if patch.forward.single else out / block.file.name).read_bytes()
        made = np.frombuffer(found[block.offset :][: block.nbytes], block.elements.carrier)
        assert block_hash(made) == int(patch.forward.after[block.number])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


# --- the code of a block


@dataclass(frozen=True)
class _Case:
    """A block of a valid patch: what is decoded against."""

    dtype: str
    base: Carrier | None
    length: int
    form: int


def _block_target(root: Path, patches: Sequence[tuple[Path, Path]]) -> Target:
    """Codes of blocks, given to the decoder alone: case, length of the table, table, code."""
    cases, seeds = list[_Case](), list[bytes]()
    for path, base in patches:
        source = Checkpoint.read(resolve(base))
        with LosslessPatch.load(path) as patch:
            delta, start = patch.forward, 0
            code = raw_read(path)["code"][1].tobytes()
            for block in delta.blocks:
                form, nbytes = int(delta.forms[block.number]), int(delta.sizes[block.number])
                tables = [delta.tables[delta.table_of[block.number]]] if form == Form.CODED else []
                table = decompress_all(pack(tables)) if tables else b""
                seeds.append(_HEAD.pack(len(cases), len(table)) + table + code[start : start + nbytes])
                found = block_state(source, block)[0]
                cases.append(_Case(block.info.dtype, found, block.stop - block.start, form))
                start += nbytes
    assert {case.form for case in cases} == set(Form), "a form is missing"

    def read(raw: bytes) -> None:
        if len(raw) < _HEAD.size:
            raise CorruptFileError("it is too short")
        number, length = _HEAD.unpack_from(raw)
        case, rest = cases[number % len(cases)], raw[_HEAD.size :]
        elements = Elements.of(case.dtype)
        out = np.empty(case.length, elements.carrier)
        try:
            tables = unpack(compress(rest[:length], 1), 1)
        except ValueError as error:
            raise CorruptFileError(str(error)) from error
        table, code = (tables[0] if tables else None), rest[length:]
        before = None if case.base is None else case.base.tobytes()
        wanted = expected(case.dtype, before, out.nbytes, case.form, code, table)
        try:
            decode(case.form, code, case.base, out, elements, table)
        except ValueError as error:
            assert wanted is None, "it is right"
            raise CorruptFileError(str(error)) from error
        assert out.tobytes() == wanted, "it is wrong"

    return Target("coded block", root / "a-block", seeds, _mutate_block, read, 0.5, REFUSALS)


_HEAD = struct.Struct("<BH")


def decompress_all(packed: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(packed)


def _mutate_block(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Another code, or a table whose frequencies still have their sum."""
    if len(data) < _HEAD.size or rng.random() < 0.05:
        return mutate_bytes(rng, data, others)
    number, length = _HEAD.unpack_from(data)
    table, code = bytearray(data[_HEAD.size :][:length]), data[_HEAD.size + length :]
    if table and rng.random() < 0.4:
        try:
            _move(rng, table)
        except (struct.error, ValueError, IndexError):  # it is damaged already
            return mutate_bytes(rng, data, others)
    else:
        mutated = mutate_bytes(rng, code)
        code = mutated if rng.random() < 0.3 else mutated[: len(code)].ljust(len(code), b"\0")
    return _HEAD.pack(number, len(table)) + bytes(table) + code


def _move(rng: random.Random, table: bytearray) -> None:
    """Change a number of the table, or move a part of one frequency to another."""
    count, gaps, values = struct.unpack_from("<BHH", table)
    alphabets, end = [], 5 + count
    for used in (gaps, values):
        alphabets.append((end, used))
        end += used * (5 + 2 * count)
    start, used = rng.choice([one for one in alphabets if one[1]])
    match rng.randrange(6):
        case 0:
            table[rng.randrange(5 + count)] = rng.choice((0, 1, 2, 31, 32, 255))
        case 1:
            place = start + 4 * rng.randrange(used)
            table[place : place + 4] = rng.choice((0, 1, 255, 1 << 20, 1 << 31, (1 << 32) - 1)).to_bytes(
                4, "little"
            )
        case 2:
            table[start + 4 * used + rng.randrange(used)] = rng.choice((0, 1, 8, 31, 32, 33, 63, 64, 65))
        case _:
            row = start + 5 * used + 2 * used * rng.randrange(count)
            one, two = (row + 2 * rng.randrange(used) for _ in range(2))
            a, b = (int.from_bytes(table[place : place + 2], "little") for place in (one, two))
            part = min(a, rng.choice((1, 7, a // 2, a)))
            for place, value in ((one, a - part), (two, b + part)) if one != two else ():
                table[place : place + 2] = (value % (1 << 16)).to_bytes(2, "little")


# --- neuron patches


def _read_neurons(root: Path, base: Path) -> Callable[[bytes], None]:
    path, out, done = root / "a-patch", root / "patched", itertools.count()
    before = raw_read(base)

    def read(raw: bytes) -> None:
        with Patch.load(path) as patch:
            assert all((str(patch), repr(patch), patch.selection is not None))
            patch.check()
            _check_neurons(patch, path)
            if next(done) < 8 or zlib.crc32(raw) % VERBS == 0:  # the first ones are valid
                ns.verify(base, patch)
                _remove(out)
                ns.apply(base, patch, out=out)
                assert_same_tensors(raw_read(out), patched_by_hand(before, path))

    return read


def _check_neurons(patch: Patch, path: Path) -> None:
    """What an accepted patch says is what the text of the format says of the file."""
    entries = patch_rows(path)
    for name, tensor in patch.tensors.items():
        index = patch.index(name)
        assert np.array_equal(entries[f"{name}:index"][1].astype(np.int64), index)
        assert np.all(index[1:] > index[:-1])
        assert not len(index) or 0 <= index[0] <= index[-1] < tensor.layout.count
        assert patch.values(name).tobytes() == entries[f"{name}:value"][1].tobytes()
        if tensor.reversible:
            assert patch.base_values(name).tobytes() == entries[f"{name}:base"][1].tobytes()
