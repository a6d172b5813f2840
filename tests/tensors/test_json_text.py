"""JSON of strangers: read as Python's parser reads it, or refused before it takes too much memory."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from document_support import carrying
from support import raw_file
from torture.bombs import BOMBS, HARMLESS

from neftsurgery.checkpoint.weight_files import weight_files
from neftsurgery.errors import CorruptFileError
from neftsurgery.sources.resolve import INDEX_NAME
from neftsurgery.tensors.document import read_document, read_object
from neftsurgery.tensors.header import TensorInfo, read_header
from neftsurgery.tensors.json_text import loads
from neftsurgery.tensors.writer import written_file

MODEL = "model.layers.{}.mlp.experts.{}.up_proj.weight"
NAMES = [MODEL.format(number // 1200, number) for number in range(70_000)]


def peak(work: Callable[[], object]) -> tuple[object, int]:
    """What it returns, or the error it raises, and the most bytes it took."""
    tracemalloc.start()
    try:
        try:
            result = work()
        except ValueError as error:
            result = error
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, -2.5, 1e3, null, true, "\\u00fc\\ud83d\\ude00", {"b": {}}]}', "[]", "0", '"x"', " null\n"],
)
def test_what_is_valid_is_read_as_by_pythons_own_parser(text: str) -> None:
    assert loads(text.encode()) == json.loads(text)
    assert loads(b"\xef\xbb\xbf" + text.encode()) == json.loads(text), "some editors write a byte order mark"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1, "a": 1}', "the key 'a' occurs twice"),
        (b'{"x": {"k\\u0061": 1, "ka": 2}}', "the key 'ka' occurs twice"),
        (b"[NaN]", "NaN is not a finite number"),
        (b"[-Infinity]", "-Infinity is not a finite number"),
        (b"[1e999]", "1e999 is not a finite number"),
        (b"[" * 2000 + b"]" * 2000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 5000, "digits"),
        ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "Expecting property name"),
        ('{"ü": 1}'.encode("latin-1"), "byte 2 is not UTF-8"),
        (b'["\xed\xa0\x80"]', "byte 2 is not UTF-8"),
        (b'["\n"]', "control character"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_not_is_refused_with_a_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"not valid JSON: .*{reason}") as caught:
        loads(raw)
    assert len(str(caught.value)) < 400
    assert "sys.set" not in str(caught.value)


@pytest.mark.parametrize("nbytes", [100_000, 3_000_000])
@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_in_proportion(name: str, nbytes: int) -> None:
    """Whatever the values: at most 24 MB more than 20 times the text. Unbounded, some take 45 times."""
    raw = BOMBS[name](nbytes)
    assert nbytes // 2 <= len(raw) <= nbytes + 200
    result, took = peak(lambda: loads(raw))
    assert took < (24 << 20) + 20 * len(raw), f"{took / len(raw):.0f} times as much"
    if name in HARMLESS:
        assert not isinstance(result, ValueError), result


@pytest.mark.parametrize("name", ["empty lists", "empty objects", "objects", "nested lists"])
def test_many_small_values_are_not_parsed_at_all(name: str) -> None:
    raw = BOMBS[name](20_000_000)
    result, took = peak(lambda: loads(raw))
    assert "too large: its" in str(result)
    assert took < 1_000_000


def padded(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def test_a_header_with_as_many_tensors_as_the_largest_models_is_read(tmp_path: Path) -> None:
    entries = {
        name: {"dtype": "BF16", "shape": [2, 4], "data_offsets": [16 * number, 16 * (number + 1)]}
        for number, name in enumerate(NAMES)
    }
    path = tmp_path / "model.safetensors"
    raw = padded(entries)
    with open(path, "wb") as file:
        file.write(raw)
        file.truncate(len(raw) + 16 * len(NAMES))
    header, took = peak(lambda: read_header(path))
    assert list(header.tensors) == NAMES  # type: ignore[attr-defined]
    assert took < 12 * len(raw)


def test_an_index_with_as_many_tensors_is_read(tmp_path: Path) -> None:
    shards = [f"model-{number:05}-of-00062.safetensors" for number in range(1, 63)]
    for name in shards:
        raw_file(tmp_path / name, {name: ("U8", np.zeros(1, "u1"))})
    content = {"weight_map": {name: shards[number % 62] for number, name in enumerate(NAMES)}}
    (tmp_path / INDEX_NAME).write_text(json.dumps(content, indent=2))
    found, took = peak(lambda: weight_files(tmp_path))
    assert (list(found.parts_of), set(found.listed)) == (shards, set(NAMES))
    assert took < 12 * (tmp_path / INDEX_NAME).stat().st_size


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    """A file of this package with the shortest entries there are, far more of them than any model has."""
    entries = [TensorInfo(f"{number:x}", "U8", (1,)) for number in range(200_000)]
    with written_file(entries, {}, tmp_path / "many") as written:
        written.finish({})
    assert len(read_header(tmp_path / "many").tensors) == 200_000


# --- objects in files


def test_a_larger_file_than_a_config_can_be_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    with open(path, "r+b") as file:
        file.truncate(1 << 40)  # sparse
    error, took = peak(lambda: caught(path))
    assert "larger than 10,000,000 bytes" in str(error)
    assert took < 1_000_000
    path.write_text('{"a": 1}')
    assert read_object(path, most=8) == {"a": 1}
    with pytest.raises(CorruptFileError, match="larger than 7 bytes"):
        read_object(path, most=7)


def caught(path: Path) -> CorruptFileError:
    with pytest.raises(CorruptFileError) as error:
        read_object(path)
    assert error.value.file == str(path)
    return error.value


@pytest.mark.parametrize("text", ["[]", "null", "1", '"x"'])
def test_another_value_than_an_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    assert "not a JSON object" in str(caught(tmp_path / "x"))


def test_a_pipe_in_the_place_of_a_config_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert "not a regular file" in str(caught(tmp_path / "config.json"))
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        read_object(tmp_path)


@pytest.mark.parametrize("name", ["empty lists", "objects"])
def test_a_document_inside_a_header_is_bounded_too(tmp_path: Path, name: str) -> None:
    text = '{"version":1,"tensors":' + BOMBS[name](8_000_000).decode() + "}"
    with pytest.raises(CorruptFileError, match="too large"), carrying(tmp_path, text) as file:
        read_document(file, "neuron_patch", "patch", 1)
