"""Hostile lossless patches: refused with bounded work and memory, and nothing is written.

Whoever forges a patch makes its hash fit, too: so most forgeries here have a right hash, made from the text
of ``docs/patch-format.md`` alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hostile_support import EDITS, Edit, edited, frugal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lossless_support import Tensors, contents, folder, tensor, touched
from safetensors import safe_open
from support import raw_file, raw_read, sealed, snapshot

import neftsurgery as ns
from neftsurgery.patch.lossless import LosslessPatch

fuzz = settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))

RNG = np.random.default_rng(0)
BASE = {
    "a.weight": tensor("BF16", (40, 60), RNG),
    "b.weight": tensor("F32", (30, 20), RNG),
    "c": tensor("U8", (50,), RNG),
}
TUNED = {name: touched(one, 0.2, RNG) for name, one in BASE.items()} | {"d": tensor("I16", (9,), RNG)}
FILES = {"config.json": b'{"a": 1}', "vocab.txt": b"a b c"}
ORDER = ("form", "table", "size", "changed", "before", "after", "layout", "tables", "side")


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(content)


def unzstd(packed: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(packed)


class Case:
    """A folder with a base, a tuned checkpoint, and a valid reversible patch, whose parts can be changed."""

    def __init__(self, root: Path, base: Tensors = BASE, shards: int = 2) -> None:
        self.root = root
        self.base = folder(root / "base", base, 1, FILES)
        self.tuned = folder(root / "tuned", TUNED, shards, FILES | {"vocab.txt": b"a b c d" * 50})
        self.good = root / "good"
        ns.extract(self.base, self.tuned, lossless=True, reversible=True, out=self.good).close()
        with safe_open(self.good, "numpy") as file:
            self.text: str = file.metadata()["neuron_patch"]
        self.kept = raw_read(self.good)
        self.reset()

    def reset(self) -> None:
        """All parts as they are in the valid patch."""
        self.entries: dict[str, tuple[str, np.ndarray]] = {
            n: (k, b.copy()) for n, (k, b) in self.kept.items()
        }
        self.manifest: dict[str, Any] = json.loads(self.text)

    def layout(self, way: str = "forward") -> Any:
        return json.loads(unzstd(self.entries[f"{way}:layout"][1].tobytes()))

    def set(self, name: str, content: bytes | np.ndarray, kind: str = "U8") -> None:
        self.entries[name] = kind, np.frombuffer(content, np.uint8) if isinstance(content, bytes) else content

    def set_layout(self, layout: Any) -> None:
        text = layout if isinstance(layout, bytes) else json.dumps(layout).encode()
        self.set("forward:layout", zstd(text))

    def set_header(self, change: Callable[[dict[str, Any]], object], number: int = 0) -> None:
        """Change the header of a weight file of the layout."""
        layout = self.layout()
        header = json.loads(layout["files"][number]["header"])
        changed = change(header)
        layout["files"][number]["header"] = json.dumps(header if changed is None else changed)
        self.set_layout(layout)

    def write(self, *, fitting: bool = True) -> Path:
        """The patch; ``fitting``: with the hash that its parts have."""
        metadata = {"neuron_patch": json.dumps(self.manifest, separators=(",", ":"))}
        if fitting:
            reversible = self.manifest.get("reversible") is True
            names = [f"{way}:{part}" for way in ("forward", "backward")[: 1 + reversible] for part in ORDER]
            none = "U8", np.zeros(0, np.uint8)
            parts = [(name, self.entries.get(name, none)[1].tobytes()) for name in names]
            metadata = sealed(self.manifest, parts)
        return raw_file(self.root / "bad", self.entries, metadata)

    def refused(self, path: Path, says: str = ".") -> None:
        """Every verb refuses it, and changes no file or folder."""
        before = snapshot(self.root)
        with frugal(48 << 20):
            for verb in (
                lambda: ns.apply(self.base, path, out=self.root / "out"),
                lambda: ns.apply(self.base, [path, self.good], out=self.root / "out"),
            ):
                with pytest.raises((ns.CorruptFileError, ns.MismatchError), match=says) as caught:
                    verb()
                assert len(str(caught.value)) < 2000
            with suppress(ns.CorruptFileError, ns.MismatchError):
                assert not ns.verify(self.base, path).holds("base"), "verify promises what apply refuses"
        assert snapshot(self.root) == before


@pytest.fixture(scope="module")
def shared() -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as name:
        yield Case(Path(name))


@pytest.fixture
def case(shared: Case) -> Case:
    shared.reset()
    return shared


def test_the_hash_of_the_specification_is_the_one_that_is_written(case: Case) -> None:
    ns.apply(case.base, case.write(), out=case.root / "out")
    assert contents(case.root / "out") == contents(case.tuned)
    shutil.rmtree(case.root / "out")
    assert case.manifest == json.loads(case.text)


@pytest.mark.parametrize("name", [f"{way}:{part}" for way in ("forward", "backward") for part in ORDER])
def test_one_flipped_bit_of_anything_but_the_code(case: Case, name: str) -> None:
    LosslessPatch.load(case.write(fitting=False)).close()
    bits = case.entries[name][1]
    bits.reshape(-1).view(np.uint8)[bits.nbytes // 2] ^= 1
    case.refused(case.write(fitting=False), says="damaged|hash|layout|table|block|form")


@pytest.mark.parametrize("position", np.linspace(0, 0.999, 12))
def test_one_flipped_bit_of_the_code(case: Case, position: float) -> None:
    code = case.entries["code"][1]
    code[int(position * len(code))] ^= 8
    before = snapshot(case.root)
    path = case.write()
    forward = int(case.entries["forward:size"][1].astype(np.int64).sum())
    verb, source = (ns.apply, case.base) if position * len(code) < forward else (ns.revert, case.tuned)
    with pytest.raises(ns.CorruptFileError, match=r"code of a block|hash of its result"):
        verb(source, path, out=case.root / "out")
    assert snapshot(case.root) == before | {"bad": snapshot(path)[""]}
    path.unlink()


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["a.weight"].pop(key)


def put(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["a.weight"].update({key: value})


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "not an object": lambda header: [1, 2],
    "a number": lambda header: 7,
    "an entry that is a list": lambda header: header.update({"a.weight": [1]}),
    "no dtype": drop("dtype"),
    "no shape": drop("shape"),
    "no offsets": drop("data_offsets"),
    "an unknown dtype": put("dtype", "F128"),
    "a dtype that is an object": put("dtype", {"F32": None}),
    "another dtype": put("dtype", "F32"),
    "a negative size": put("shape", [-40, -60]),
    "a huge size": put("shape", [1 << 62, 1 << 62]),
    "a huge size and none": put("shape", [0, 1 << 63, 1 << 63]),
    "a size of 5,000 digits": lambda header: header["a.weight"].update(shape=[int("9" * 4000)]),
    "many huge sizes": put("shape", [1 << 62] * 50_000),
    "a size that is true": put("shape", [True, 2400]),
    "a size that is a text": put("shape", "ab"),
    "a size that is a fraction": put("shape", [40.0, 60]),
    "a shape that is a number": put("shape", 2400),
    "no places": put("data_offsets", []),
    "a place": put("data_offsets", [0]),
    "places that are texts": put("data_offsets", ["0", "4800"]),
    "a gap before": put("data_offsets", [2, 4802]),
    "places before the start": put("data_offsets", [-2, 4798]),
    "too few bytes": put("data_offsets", [0, 4798]),
    "bytes that overlap": lambda header: header.update(z=header["a.weight"]),
    "a gap between": lambda header: header.update(
        z={"dtype": "U8", "shape": [1], "data_offsets": [9999, 10000]}
    ),
    "metadata that is a list": lambda header: header.update(__metadata__=["x"]),
    "metadata that is not text": lambda header: header.update(__metadata__={"k": 1}),
    "half a byte": lambda header: header.update(
        {"a.weight": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}
    ),
    "a petabyte": lambda header: header.update(
        {"a.weight": {"dtype": "U8", "shape": [1 << 50], "data_offsets": [0, 1 << 50]}}
    ),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_headers_that_do_not_follow_the_format(
    case: Case, change: Callable[[dict[str, Any]], object]
) -> None:
    case.set_header(change)
    case.refused(case.write(), says="weight file|does not fit|does not follow|header")


NAMES = [
    "../evil.safetensors", "/etc/evil.safetensors", "a/b.safetensors", "a/b/c.safetensors",
    "a\\b.safetensors", "..", ".", "",
    "x" * 300 + ".safetensors", "\0.safetensors", "\ud800.safetensors", "pytorch_model.bin", "run.py",
    "config.json",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
@pytest.mark.parametrize("which", ["files", "side"])
def test_names_that_leave_the_folder_or_do_not_belong_there(case: Case, name: str, which: str) -> None:
    layout = case.layout()
    layout[which][0]["name"] = "modeling_x.py" if which == "side" and name == "config.json" else name
    case.set_layout(layout)
    # A file of a part, `a/b.safetensors`, has a name that is allowed, and no such tensors.
    case.refused(case.write(), says="name|ending|belong|another checkpoint|does not follow")


def bombs() -> dict[str, Callable[[Case], object]]:
    """Small patches that ask for much."""

    def many_files(case: Case) -> None:
        layout = case.layout()
        layout["files"] *= 2
        case.set_layout(layout)

    def same_tensor(case: Case) -> None:
        """Each array has a copy of its block."""
        layout = case.layout()
        header = json.loads(layout["files"][0]["header"])
        name, entry = next((n, e) for n, e in header.items() if n != "__metadata__")
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        more = {name: {**entry, "data_offsets": [0, size]}}
        layout["files"].append({"name": "more.safetensors", "header": json.dumps(more)})
        case.set_layout(layout)
        for part in ("form", "table", "size", "changed", "before", "after"):
            kind, bits = case.entries[f"forward:{part}"]
            case.entries[f"forward:{part}"] = kind, np.append(bits, bits[0])

    def single(case: Case) -> None:
        case.set_layout(case.layout() | {"single": True})

    def side(**values: object) -> Callable[[Case], None]:
        def change(case: Case) -> None:
            layout = case.layout()
            layout["side"][-1].update(values)
            case.set_layout(layout)

        return change

    def side_bomb(case: Case) -> None:
        packed = zstd(bytes(100 << 20))
        layout, number = case.layout(), -1
        old = layout["side"][number]["packed"]
        layout["side"][number] |= {"packed": len(packed), "bytes": 10}
        case.set("forward:side", case.entries["forward:side"][1].tobytes()[:-old] + packed)
        case.set_layout(layout)

    def block_bomb(case: Case) -> None:
        code, sizes = case.entries["code"][1].tobytes(), case.entries["forward:size"][1].copy()
        packed = zstd(bytes(64 << 20))[: int(sizes[0])].ljust(int(sizes[0]), b"\0")
        case.entries["forward:form"][1][0] = 3
        case.set("code", packed + code[len(packed) :])

    def sizes(case: Case) -> None:
        case.entries["forward:size"][1][0] = (1 << 32) - 1

    def more_code(case: Case) -> None:
        case.set("code", case.entries["code"][1].tobytes() + bytes(5))

    def claimed(name: str) -> Callable[[Case], None]:
        frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + b"\1\0\0"
        return lambda case: case.set(name, frame)

    return {
        "a layout of 400 MB": lambda case: case.set_layout(b'{"files":[' + b"[]," * 133_000_000 + b"[]]}"),
        "a layout nested deeply": lambda case: case.set_layout(b"[" * 3_000_000),
        "a layout that is a list": lambda case: case.set_layout([]),
        "a layout of garbage": lambda case: case.set("forward:layout", b"zstd?" * 9),
        "a layout that claims an exabyte": claimed("forward:layout"),
        "tables of 90 MB": lambda case: case.set("forward:tables", zstd(bytes(90_000_000))),
        "65,536 tables": lambda case: case.set("forward:tables", zstd((b"\1\1" + bytes(768)) * 65_536)),
        "tables that claim an exabyte": claimed("forward:tables"),
        "no tables": lambda case: case.set("forward:tables", zstd(b"")),
        "the same files twice": many_files,
        "a tensor in two files": same_tensor,
        "a single file that is several": single,
        "no files": lambda case: case.set_layout(case.layout() | {"files": []}),
        "files that are numbers": lambda case: case.set_layout(case.layout() | {"files": [5, "x", None]}),
        "a side file of 100 MB in a few kB": side_bomb,
        "a side file with a negative size": side(bytes=-1),
        "a side file with a size that is true": side(packed=True),
        "a side file that is longer than its part": side(packed=1 << 20),
        "a side file with another hash": side(sha256=hashlib.sha256(b"x").hexdigest()),
        "a side file with a hash that is a number": side(sha256=5),
        "a block of 64 MB in a few kB": block_bomb,
        "sizes that go beyond the code": sizes,
        "code behind the last block": more_code,
        "an unknown form": lambda case: case.entries["forward:form"][1].__setitem__(0, 5),
        "a table that is not there": lambda case: case.entries["forward:table"][1].__setitem__(0, 999),
        "a block of a hash of its own": lambda case: case.entries["forward:after"][1].__setitem__(0, 5),
        "a base of another hash": lambda case: case.entries["forward:before"][1].__setitem__(0, 5),
        "an entry too many": lambda case: case.set("junk", b"x"),
        "an entry of a way that is not there": lambda case: case.manifest.update(reversible=False),
        "no code": lambda case: case.entries.pop("code"),
        "no side files": lambda case: case.entries.pop("forward:side"),
        "a block too few": lambda case: case.set("forward:form", case.entries["forward:form"][1][:-1]),
        "forms of another type": lambda case: case.set("forward:form", case.entries["forward:form"][1], "I8"),
        "code of another type": lambda case: case.set("code", case.entries["code"][1], "BOOL"),
        "a layout of another type": lambda case: case.set("forward:layout", bytes(8), "F64"),
        "a layout without a shape": lambda case: case.set("forward:layout", np.uint8(5).reshape(())),
        "another kind": lambda case: case.manifest.update(kind="quantized"),
        "a version that is to come": lambda case: case.manifest.update(version=3),
        "a version that is true": lambda case: case.manifest.update(version=True),
        "another base": lambda case: case.manifest.update(base={"fingerprint": "xxh3-128:" + "0" * 32}),
        "no base": lambda case: case.manifest.update(base=None),
    }


BOMBS = bombs()


@pytest.mark.parametrize("change", BOMBS.values(), ids=BOMBS)
def test_parts_that_lie(case: Case, change: Callable[[Case], object]) -> None:
    change(case)
    case.refused(case.write())


def test_the_command_line_says_it_in_a_sentence(case: Case, neft: Callable[..., Any]) -> None:
    """Damaged, and another base: the exit codes of the contract, without a traceback."""
    case.entries["forward:after"][1][0] ^= 1
    done = neft("apply", case.base, case.write(), "-o", case.root / "out")
    assert (done.code, "Traceback" in done.err, str(case.root / "bad") in done.err) == (4, False, True)
    case.reset()
    case.manifest["base"]["fingerprint"] = "xxh3-128:" + "0" * 32
    done = neft("apply", case.base, case.write(), "-o", case.root / "out")
    assert (done.code, "fingerprint" in done.err) == (3, True)
    assert not (case.root / "out").exists()


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_result_with_another_fingerprint_than_recorded(
    case: Case, tmp_path: Path, neft: Callable[..., Any], way: str
) -> None:
    """Before the output has its name, or before the journal of a change in place is removed."""
    side, verb, source = ("tuned", "apply", case.base) if way == "forward" else ("base", "revert", case.tuned)
    case.manifest[side]["fingerprint"] = "xxh3-128:" + 32 * "7"
    path, before = case.write(), snapshot(case.root)
    done = neft(verb, source, path, "-o", case.root / "out")
    assert (done.code, "does not make the checkpoint that it names" in done.err) == (4, True), done.err
    if way == "forward":
        assert neft("verify", source, path).code == 4
    assert snapshot(case.root) == before
    alike = Case(tmp_path, {name: touched(one, 0.2, RNG) for name, one in TUNED.items()}, 1)
    alike.manifest[side]["fingerprint"] = "xxh3-128:" + 32 * "7"
    path, before = alike.write(), snapshot(tmp_path)
    done = neft(verb, alike.base if way == "forward" else alike.tuned, path, "--in-place")
    assert (done.code, "does not make the checkpoint that it names" in done.err) == (4, True), done.err
    assert snapshot(tmp_path) == before


def test_what_the_manifest_says_is_shown_and_not_relied_on(case: Case) -> None:
    for values in ({"not_carried": [{"a": 1}, 5, "\x1b[31m"]}, {"not_carried": 5}, {"created_by": []}):
        case.reset()
        case.manifest.update(values)
        path = case.write()
        with LosslessPatch.load(path) as patch:
            assert all(isinstance(name, str) for name in patch.not_carried)
            assert str(patch)
        ns.apply(case.base, path, out=case.root / "out", force=True)
        assert contents(case.root / "out") == contents(case.tuned)
    shutil.rmtree(case.root / "out")


def survives(case: Case, path: Path) -> None:
    """Only errors of this package are raised; nothing is written then."""
    before = snapshot(case.root)
    for verb, source in ((ns.apply, case.base), (ns.revert, case.tuned)):
        try:
            with frugal(48 << 20):
                ns.verify(source, path)
                verb(source, path, out=case.root / "out")
        except ns.NeftError:
            assert snapshot(case.root) == before
        shutil.rmtree(case.root / "out", ignore_errors=True)


def draw_number(data: st.DataObject) -> int:
    return data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 255, 256, 1 << 15, (1 << 31) - 1]))


@fuzz
@given(data=st.data())
def test_parts_changed_at_random_with_a_fitting_hash(shared: Case, data: st.DataObject) -> None:
    shared.reset()
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(shared.entries)))
        kind, bits = shared.entries[name]
        raw = bytearray(bits.tobytes())
        packed = name.endswith(("layout", "tables"))
        if packed and data.draw(st.booleans()):
            raw = bytearray(unzstd(bytes(raw)))
        where = data.draw(st.integers(0, max(0, len(raw) - 1)))
        match data.draw(st.sampled_from(["flip", "set", "cut", "more"])):
            case "flip" if raw:
                raw[where] ^= data.draw(st.integers(1, 255))
            case "set":
                number = draw_number(data).to_bytes(4, "little")
                raw[where : where + 4] = number[: len(raw) - where]
            case "cut" if kind == "U8":
                del raw[where:]
            case "more" if kind == "U8":
                raw += data.draw(st.binary(min_size=1, max_size=9))
        if packed and raw[:4] != b"\x28\xb5\x2f\xfd":
            raw = bytearray(zstd(bytes(raw)))
        shared.entries[name] = kind, np.frombuffer(bytes(raw), bits.dtype)
    survives(shared, shared.write())


def places(value: object, here: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """Every position in a JSON document, the headers in it included."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*here, key))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [0, 1, 2, -1, 2**31, 2**63, 2**64, 10**40, 1.5, "", "U8", "F4", "a.weight", "config.json"]
    ),
    st.lists(st.sampled_from([0, 1, 40, 60, 4800, 2**62]), max_size=3),
    st.dictionaries(st.sampled_from(["dtype", "shape", "name"]), st.integers(), max_size=2),
)


@fuzz
@given(data=st.data())
def test_any_layout_is_refused_or_does_no_harm(shared: Case, data: st.DataObject) -> None:
    shared.reset()
    layout: Any = copy.deepcopy(shared.layout())
    for file in layout["files"]:
        file["header"] = json.loads(file["header"])
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from([place for place in places(layout) if place]))
        parent = layout
        for key in path:
            parent = parent[key]
        if data.draw(st.booleans()):
            parent[last] = data.draw(ODD)
        else:
            del parent[last]
    for file in layout.get("files") or [] if isinstance(layout.get("files"), list) else []:
        if isinstance(file, dict) and "header" in file:
            file["header"] = json.dumps(file["header"])
    shared.set_layout(layout)
    survives(shared, shared.write())


@fuzz
@given(edits=EDITS)
def test_any_bytes_are_refused_or_right(shared: Case, edits: list[Edit]) -> None:
    path = shared.root / "bad"
    path.write_bytes(edited(shared.good.read_bytes(), edits))
    before = snapshot(shared.root)
    try:
        ns.apply(shared.base, path, out=shared.root / "out")
    except ns.NeftError:
        assert snapshot(shared.root) == before
    else:
        assert contents(shared.root / "out") == contents(shared.tuned)
        shutil.rmtree(shared.root / "out")
