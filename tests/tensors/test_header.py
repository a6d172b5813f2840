"""Headers: the safetensors package is the oracle of what is a valid file and of what is in it."""

from __future__ import annotations

import json
import math
import re
import resource
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from torture.fuzz.oracle import agrees, packages_view, stricter

from neftsurgery.errors import CorruptFileError
from neftsurgery.tensors import header as header_module
from neftsurgery.tensors.dtypes import DTYPES
from neftsurgery.tensors.header import (
    MAX_HEADER_BYTES,
    FilePlan,
    TensorInfo,
    read_header,
)

NUMPY = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}


def pack(header: object, data: bytes = b"", claim: int | None = None) -> bytes:
    """A file: the length (or another ``claim``), the header (text, bytes or an object), the data."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if claim is None else claim) + raw + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_entry(name: str, shape: str = "[2,2]", end: int = 16, space: str = "") -> str:
    return f'{{"{name}":{{"dtype":"I32","shape":{shape},"data_offsets":[0,{space}{end}]}}}}'


def put(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


# The reference implementation's own cases, byte for byte as in the shared data.
PLAIN = pack(raw_entry("test"), bytes(16))
MUST_OPEN = {
    "deserialization_1": PLAIN,
    "empty_shapes_allowed_1": pack(raw_entry("test", "[]", 4), bytes(4)),
    "lifetimes_1": PLAIN,
    "whitespace_leading_padded_header_1": pack("\t\n{}\r "),
    "whitespace_padded_header_1": pack("{}\r \t\n"),
    "zero_sized_tensor_1": pack(raw_entry("test", "[2,0]", 0, " ")),
}
MUST_BE_REFUSED = {
    "header_too_large_1": pack(raw_entry("test"), bytes(16), claim=0xFFFFFF000000003C),
    "header_too_small_1": b"",
    "invalid_header_length_1": pack("", claim=60),
    "invalid_header_non_utf8_1": pack(b"\xff"),
    "invalid_header_not_json_1": pack("{"),
    "invalid_info_1": pack(raw_entry("test", end=4, space=" ")),
    "metadata_incomplete_buffer_1": pack(
        raw_entry("test"), bytes(16) + b"extra_bogus_data_for_polyglot_file"
    ),
    "metadata_incomplete_buffer_2": pack(raw_entry("test"), bytes(14)),
    "validation_overflow_1": pack(raw_entry("test", "[2,18446744073709551614]"), bytes(16)),
    "validation_overflow_2": pack(raw_entry("test", "[2,9223372036854775807]"), bytes(16)),
}
EXPECTED = {
    "deserialization_1": {"test": (2, 2)},
    "empty_shapes_allowed_1": {"test": ()},
    "lifetimes_1": {"test": (2, 2)},
    "whitespace_leading_padded_header_1": {},
    "whitespace_padded_header_1": {},
    "zero_sized_tensor_1": {"test": (2, 0)},
}


def check_reference_case(path: Path, name: str) -> None:
    if name in MUST_OPEN:
        header = read_header(path)
        assert {key: info.shape for key, info in header.tensors.items()} == EXPECTED[name]
        assert all(info.dtype == "I32" for info in header.tensors.values())
    else:
        with pytest.raises(CorruptFileError) as error:
            read_header(path)
        assert error.value.file == str(path)


@pytest.mark.parametrize("name", sorted(MUST_OPEN | MUST_BE_REFUSED))
def test_reference_case_inline(tmp_path: Path, name: str) -> None:
    check_reference_case(put(tmp_path, (MUST_OPEN | MUST_BE_REFUSED)[name]), name)


@pytest.mark.parametrize("name", sorted(MUST_OPEN | MUST_BE_REFUSED))
def test_reference_case_of_the_shared_data(shared_data: Path, name: str) -> None:
    path = shared_data / "malformed" / f"{name}.safetensors"
    assert path.read_bytes() == (MUST_OPEN | MUST_BE_REFUSED)[name]
    check_reference_case(path, name)


def test_shared_data_has_no_other_cases(shared_data: Path) -> None:
    names = {path.stem for path in (shared_data / "malformed").glob("*.safetensors")}
    assert names == set(MUST_OPEN | MUST_BE_REFUSED)


# What the safetensors package accepts, and we do not.

BODY = '"dtype":"F32","shape":[4],"data_offsets":[0,16]'


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (f'{{"a":{{{BODY}}},"a":{{{BODY}}}}}', "a"),
        (f'{{"__metadata__":{{"k":"v","k":"w"}},"a":{{{BODY}}}}}', "k"),
        (f'{{"a":{{"x":1,"x":2,{BODY}}}}}', "x"),
        (f'{{"a\\u0062":{{{BODY}}},"ab":{{{BODY}}}}}', "ab"),
    ],
    ids=["two tensors", "inside metadata", "an unknown field", "once escaped"],
)
def test_duplicate_keys_are_refused_though_the_package_accepts_them(
    tmp_path: Path, text: str, key: str
) -> None:
    path = put(tmp_path, pack(text, bytes(16)))
    with safe_open(path, framework="numpy") as file:
        assert len(list(file.keys())) == 1
    with pytest.raises(CorruptFileError, match=f"the key '{key}' occurs twice"):
        read_header(path)


@pytest.mark.parametrize(
    "text",
    [
        f'{{"a":{{"dtype":"F32",{BODY}}}}}',
        f'{{"a":{{"shape":[2,2],{BODY}}}}}',
        f'{{"a":{{"data_offsets":[0,16],{BODY}}}}}',
        f'{{"__metadata__":{{}},"__metadata__":{{"k":"w"}},"a":{{{BODY}}}}}',
    ],
    ids=["dtype", "shape", "data_offsets", "__metadata__"],
)
def test_duplicate_fields_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CorruptFileError):
        read_header(put(tmp_path, pack(text, bytes(16))))


@pytest.mark.parametrize(
    "text",
    ['{"a":["F32",[4],[0,16]]}', '{"a":{"dtype":{"F32":null},"shape":[4],"data_offsets":[0,16]}}'],
    ids=["entry as a list", "dtype as an object"],
)
def test_forms_that_only_the_package_reads_are_refused(tmp_path: Path, text: str) -> None:
    path = put(tmp_path, pack(text, bytes(16)))
    with safe_open(path, framework="numpy") as file:
        assert list(file.keys()) == ["a"]
    with pytest.raises(CorruptFileError) as error:
        read_header(path)
    assert error.value.tensor == "a"


# Sizes.


@pytest.mark.parametrize(
    "claim", [2**63, 2**63 - 1, 2**64 - 1, 2**32, MAX_HEADER_BYTES + 1, MAX_HEADER_BYTES]
)
def test_a_claim_of_a_huge_header_costs_nothing(tmp_path: Path, claim: int) -> None:
    path = put(tmp_path, pack("{}", b" " * 100, claim=claim))
    check_refused_cheaply(path)


def test_a_header_over_the_limit_is_refused_even_if_it_is_there(tmp_path: Path) -> None:
    path = put(tmp_path, pack("{}", claim=MAX_HEADER_BYTES + 1))
    with path.open("r+b") as file:
        file.truncate(8 + MAX_HEADER_BYTES + 1)  # sparse
    check_refused_cheaply(path)


def check_refused_cheaply(path: Path) -> None:
    tracemalloc.start()
    begun = time.perf_counter()
    try:
        with pytest.raises(CorruptFileError):
            read_header(path)
        assert time.perf_counter() - begun < 0.5
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_no_tensor_data_is_read(tmp_path: Path) -> None:
    size = 1 << 32
    path = put(tmp_path, pack({"a": entry("U8", [size], 0, size)}))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)  # sparse
    tracemalloc.start()
    try:
        header = read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert header.tensors["a"].nbytes == size


def test_a_file_that_cannot_be_opened_twice_is_the_machines_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package calls a file missing, whatever kept it from opening it: here, too many open files."""
    path = put(tmp_path, pack("{}", b""))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def few(*arguments: object, **options: object) -> object:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        return safe_open(*arguments, **options)

    monkeypatch.setattr(header_module, "safe_open", few)
    try:
        with pytest.raises(OSError, match="Too many open files"):
            read_header(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_missing_file_is_the_machines_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(OSError, match="directory"):
        read_header(tmp_path)


# Element types.


def test_the_types_are_those_of_the_format(tmp_path: Path) -> None:
    path = put(tmp_path, pack({"a": entry("NONE", [4], 0, 16)}, bytes(16)))
    with pytest.raises(SafetensorError) as error, safe_open(path, framework="numpy"):
        pass
    known = re.findall("`(\\w+)`", str(error.value))[1:]
    assert len(known) > 20
    assert list(DTYPES) == known
    assert all(DTYPES[name].name == name for name in known)
    with pytest.raises(KeyError):
        DTYPES["NONE"]


@pytest.mark.parametrize("name", list(DTYPES))
def test_each_type_has_the_size_the_package_gives_it(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    size = dtype.nbytes(24)  # whole bytes for types of 4 and of 6 bits
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
    path = put(tmp_path, pack({"a": entry(name, [2, 12], 0, size)}, data))
    header = read_header(path)
    assert header.tensors == {"a": TensorInfo("a", name, (2, 12))}
    assert header.tensors["a"].nbytes == size
    assert header.tensors["a"].type is dtype
    assert path.read_bytes()[header.offsets["a"] :] == data
    for wrong in (size - 1, size + 1):
        with pytest.raises(CorruptFileError):
            read_header(put(tmp_path, pack({"a": entry(name, [2, 12], 0, wrong)}, bytes(wrong))))


@pytest.mark.parametrize("name", list(DTYPES))
def test_itemsize_and_carrier(name: str) -> None:
    dtype = DTYPES[name]
    if dtype.bits % 8:
        assert dtype.kind == "packed"
        with pytest.raises(ValueError, match="whole bytes"):
            _ = dtype.itemsize
    else:
        assert dtype.carrier.kind == "u"
        assert dtype.carrier.itemsize == dtype.itemsize
    if name in NUMPY:
        kinds = {"f": "float", "i": "integer", "u": "integer", "b": "bool", "c": "complex"}
        assert dtype.itemsize == np.dtype(NUMPY[name]).itemsize
        assert dtype.kind == kinds[np.dtype(NUMPY[name]).kind]


@pytest.mark.parametrize(
    ("name", "elements", "size"), [("F4", 3, 2), ("F4", 4, 2), ("F6_E2M3", 4, 3), ("F6_E3M2", 1, 1)]
)
def test_packed_sizes_round_up(name: str, elements: int, size: int) -> None:
    assert DTYPES[name].nbytes(elements) == size


def test_zero_sizes_and_scalars(tmp_path: Path) -> None:
    content = {
        "empty first": entry("F32", [0], 0, 0),
        "scalar": entry("F64", [], 0, 8),
        "empty between": entry("I8", [3, 0, 5], 8, 8),
        "one": entry("BF16", [1, 1, 1], 8, 10),
        "vast and empty": entry("F32", [2**62, 0], 10, 10),
    }
    path = put(tmp_path, pack(content, bytes(range(10))))
    header = read_header(path)
    assert {n: i.shape for n, i in header.tensors.items()} == {
        n: tuple(e["shape"]) for n, e in content.items()
    }
    assert {n: i.elements for n, i in header.tensors.items()} == {
        n: math.prod(e["shape"]) for n, e in content.items()
    }
    for name, item in content.items():
        assert header.offsets[name] == header.size + item["data_offsets"][0]


def test_tensors_come_in_file_order(tmp_path: Path) -> None:
    content = {"b": entry("U8", [1], 2, 3), "c": entry("U8", [2], 0, 2), "a": entry("U8", [1], 3, 4)}
    header = read_header(put(tmp_path, pack(content, b"ccba")))
    assert list(header.tensors) == ["c", "b", "a"]


@pytest.mark.parametrize("metadata", ["null", "{}"])
def test_no_metadata(tmp_path: Path, metadata: str) -> None:
    assert read_header(put(tmp_path, pack(f'{{"__metadata__":{metadata}}}'))).metadata == {}


def test_metadata(tmp_path: Path) -> None:
    path = put(tmp_path, pack({"__metadata__": {"format": "pt", "ü": "\0\n"}}))
    assert read_header(path).metadata == {"format": "pt", "ü": "\0\n"}


def test_describe() -> None:
    assert TensorInfo("x", "BF16", (4096, 11008)).describe() == "BF16 [4096, 11008]"


# Any header at all.


@st.composite
def contents(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A valid header and its data."""
    content: dict[str, Any] = {}
    if draw(st.booleans()):
        content["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    position = 0
    for name in draw(
        st.lists(st.text(max_size=4).filter(lambda n: n != "__metadata__"), max_size=4, unique=True)
    ):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        if math.prod(shape) * DTYPES[dtype].bits % 8:
            shape.append(4)
        size = math.prod(shape) * DTYPES[dtype].bits // 8
        content[name] = entry(dtype, shape, position, position + size)
        position += size
    keys = draw(st.permutations(list(content)))
    data = draw(st.binary(min_size=position, max_size=position))
    return {key: content[key] for key in keys}, data


NUMBERS = st.one_of(
    st.integers(-1, 40),
    st.sampled_from([2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 1.0, True]),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A file that is valid, or was before a few changes to its header or its bytes."""
    content, data = draw(contents())
    names = [name for name in content if name != "__metadata__"]
    for _ in range(draw(st.integers(0, 2))):
        if not names:
            break
        item = content[draw(st.sampled_from(names))]
        match draw(
            st.sampled_from(["begin", "end", "shift", "shape", "axis", "dtype", "drop", "extra", "twice"])
        ):
            case "begin":
                item["data_offsets"] = [draw(NUMBERS), *item.get("data_offsets", [0, 0])[1:]]
            case "end":
                item["data_offsets"] = [*item.get("data_offsets", [0, 0])[:1], draw(NUMBERS)]
            case "shift":
                by = draw(st.integers(-4, 4))
                item["data_offsets"] = [n + by for n in item.get("data_offsets", [0, 0])]
            case "shape":
                item["shape"] = draw(st.lists(NUMBERS, max_size=3))
            case "axis":
                item["shape"] = [*item.get("shape", []), draw(NUMBERS)]
            case "dtype":
                item["dtype"] = draw(st.sampled_from([*DTYPES, "", "f32", "F128"]))
            case "drop":
                item.pop(draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)
            case "extra":
                item[draw(st.text(max_size=2))] = draw(st.sampled_from([None, 1, [], {}, "x", [[0.5]]]))
            case "twice":
                content["copy"] = dict(item)
    data = draw(st.sampled_from([data, data, data, data + b"x", data[:-1], b""]))
    raw = bytearray(pack(json.dumps(content, ensure_ascii=draw(st.booleans())), data))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        place = draw(st.integers(0, len(raw) - 1))
        match draw(st.sampled_from(["flip", "drop", "insert", "cut", "blank"])):
            case "flip":
                raw[place] ^= 1 << draw(st.integers(0, 7))
            case "drop":
                del raw[place]
            case "insert":
                raw.insert(place, draw(st.sampled_from(list(b' {}[],:"\\0-.e\x00\xff'))))
            case "cut":
                del raw[place:]
            case "blank":
                raw[place] = 0x20
        if not raw:
            break
    return bytes(raw)


@settings(max_examples=500, deadline=None, database=None)
@given(mutated())
@example(pack(f'{{"a":{{{BODY}}},"a":{{{BODY}}}}}', bytes(16)))
@example(pack(f'{{"a":{{{BODY}}}}}', bytes(16)))
def test_any_header_is_read_as_the_package_reads_it(raw: bytes) -> None:
    theirs = packages_view(raw)
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder), raw)
        if theirs is None or stricter(raw):
            with pytest.raises(CorruptFileError):
                read_header(path)
            return
        header = read_header(path)
        agrees(header, raw, theirs)
        with safe_open(path, framework="numpy") as file:
            assert header.metadata == (file.metadata() or {})
            for name, info in header.tensors.items():
                if info.dtype in NUMPY:
                    array = file.get_tensor(name)
                    assert array.dtype == NUMPY[info.dtype]
                    assert array.shape == info.shape
                    begin = header.offsets[name]
                    assert array.tobytes() == raw[begin : begin + info.nbytes]


# Writing.


def test_entries_are_placed_without_gaps_and_aligned() -> None:
    entries = [
        TensorInfo("bytes", "U8", (3,)),
        TensorInfo("doubles", "F64", (2,)),
        TensorInfo("halves", "BF16", (1, 3)),
        TensorInfo("empty", "F32", (0, 4)),
        TensorInfo("words", "I32", ()),
    ]
    plan = FilePlan.of(entries, {"k": "v"})
    size = sum(e.nbytes for e in entries)
    assert plan.nbytes == plan.start + size
    assert all(plan.offsets[e.name] % e.type.itemsize == 0 for e in entries)
    spans = sorted((plan.offsets[e.name], plan.offsets[e.name] + e.nbytes) for e in entries)
    assert [spans[0][0], *(end for _, end in spans)] == [*(begin for begin, _ in spans), plan.nbytes]
    raw = b"".join(plan.pack({"k": "v"})) + bytes(range(size))
    theirs = packages_view(raw)
    assert theirs is not None
    assert {n: (t["dtype"], tuple(t["shape"])) for n, t in theirs.items()} == {
        e.name: (e.dtype, e.shape) for e in entries
    }


def test_a_name_twice_cannot_be_placed() -> None:
    with pytest.raises(ValueError, match="'a'"):
        FilePlan.of([TensorInfo("a", "F32", (1,)), TensorInfo("a", "F32", (2,))], {})


@given(st.text(max_size=20))
@settings(max_examples=50, deadline=None, database=None)
def test_a_packed_header_is_a_multiple_of_8_bytes_long(value: str) -> None:
    raw = b"".join(FilePlan.of([], {"k": value}).pack({"k": value}))
    assert len(raw) % 8 == 0
    assert struct.unpack("<Q", raw[:8])[0] == len(raw) - 8
    assert json.loads(raw[8:]) == {"__metadata__": {"k": value}}


def test_a_packed_header_fills_its_room() -> None:
    for room in ("v", "v" * 9, "v" * 1000):
        plan = FilePlan.of([], {"k": room})
        raw = b"".join(plan.pack({"k": "v"}))
        assert len(raw) == plan.start >= 8 + len(room)
        assert packages_view(raw) == {}
    with pytest.raises(ValueError, match="takes"):
        FilePlan.of([], {"k": "v"}).pack({"k": "v" * 20})


def test_a_packed_header_keeps_to_the_limit_of_the_format() -> None:
    with pytest.raises(ValueError, match=str(MAX_HEADER_BYTES)):
        FilePlan.of([], {"k": "v" * MAX_HEADER_BYTES})


def test_equal_headers_are_one_object_while_one_is_in_use(tmp_path: Path) -> None:
    header = {"w": entry("F32", [2, 2], 0, 16), "__metadata__": {"a": "b"}}
    for name in "ab":
        (tmp_path / name).write_bytes(pack(header, name.encode() * 16))
    (tmp_path / "c").write_bytes(pack({**header, "__metadata__": {"a": "c"}}, bytes(16)))
    (tmp_path / "short").write_bytes(pack(header, bytes(15)))
    first = read_header(tmp_path / "a")
    assert read_header(tmp_path / "b") is first
    other = read_header(tmp_path / "c")
    assert (other.tensors, dict(other.metadata)) == (first.tensors, {"a": "c"})
    with pytest.raises(CorruptFileError):
        read_header(tmp_path / "short")  # checked all the same
