"""The JSON that our files carry: read back as written, refused with reasons when it is not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from document_support import carrying

from neftsurgery.errors import CorruptFileError
from neftsurgery.tensors.document import Facts, as_text, bad, dump, read_document
from neftsurgery.tensors.writer import written_file

GOOD = {
    "version": 2,
    "tensors": {"w": {"shape": [3, 4], "dtype": "BF16", "neuron_axes": [0]}},
    "ü": ["\0", 0.5],
}


def read(folder: Path, text: str | None, version: int = 2) -> dict[str, Any]:
    with carrying(folder, text) as file:
        return read_document(file, "neuron_patch", "patch", version)


@pytest.mark.parametrize("version", [2, 3])
def test_a_document_of_this_or_an_older_version(tmp_path: Path, version: int) -> None:
    assert read(tmp_path, json.dumps(GOOD), version) == GOOD


def test_dump_is_what_is_read(tmp_path: Path) -> None:
    metadata = dump("neuron_patch", GOOD)
    assert list(metadata) == ["neuron_patch"]
    assert json.loads(metadata["neuron_patch"]) == GOOD
    with written_file([], metadata, tmp_path / "x") as written:
        written.finish(metadata)
    with written.reader() as file:
        assert read_document(file, "neuron_patch", "patch", 2) == GOOD


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_dump_writes_no_numbers_that_are_not_json(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        dump("k", {"value": value})


def test_a_file_without_the_key_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="not a patch: its header has no 'neuron_patch'") as error:
        read(tmp_path, None)
    assert error.value.file == str(tmp_path / "p.safetensors")


def test_a_newer_version_says_to_update(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="newer version") as error:
        read(tmp_path, json.dumps(GOOD), 1)
    assert (error.value.expected, error.value.found) == ("1 or older", 2)
    assert "git pull and pip install -U ." in str(error.value.hint)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"tensors":' * 100_000, "not valid JSON"),
        ('{"version": ' + "9" * 10_000 + ', "tensors": {}}', "not valid JSON"),
        ("[]", "not an object with tensors"),
        ("null", "not an object with tensors"),
        ('"tensors"', "not an object with tensors"),
        ('{"version": 1}', "not an object with tensors"),
        ('{"version": 1, "tensors": []}', "not an object with tensors"),
        ('{"version": 1, "tensors": null}', "not an object with tensors"),
        ('{"tensors": {}}', "no version"),
        ('{"version": null, "tensors": {}}', "no version"),
        ('{"version": "1", "tensors": {}}', "no version"),
        ('{"version": 1.0, "tensors": {}}', "no version"),
        ('{"version": true, "tensors": {}}', "no version"),
        ('{"version": 0, "tensors": {}}', "no version"),
        ('{"version": -1, "tensors": {}}', "no version"),
    ],
    ids=lambda text: text[:30],
)
def test_a_damaged_document(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(CorruptFileError, match=f"a damaged patch: .*{reason}") as error:
        read(tmp_path, text)
    assert error.value.file == str(tmp_path / "p.safetensors")
    assert len(str(error.value)) < 500


def test_bad_says_what_and_where(tmp_path: Path) -> None:
    with carrying(tmp_path, None) as file:
        error = bad(file, "patch", "it is torn", "w")
    assert str(error) == f"{tmp_path / 'p.safetensors'}, tensor w: a damaged patch: it is torn"


#: Values of a JSON object, with the text and the finite number that each one is.
VALUES: dict[str, tuple[object, str | None, float | None]] = {
    "text": ("a", "a", None), "empty": ("", "", None), "number": (0.5, None, 0.5), "whole": (3, None, 3),
    "truth": (True, None, None), "null": (None, None, None), "list": ([1], None, None),
    "object": ({}, None, None),
    "nan": (float("nan"), None, None), "infinite": (float("-inf"), None, None), "huge": (10**400, None, None),
}  # fmt: skip


def test_facts_keep_every_key_and_read_only_what_is_of_the_right_type() -> None:
    raw = {key: value for key, (value, *_) in VALUES.items()}
    facts = Facts.from_json(raw)
    for key, (value, text, number) in VALUES.items():
        assert facts[key] is value
        assert (as_text(facts.get(key)), facts.number(key)) == (text, number)
    assert (as_text(facts.get("missing")), facts.number("missing")) == (None, None)
    assert list(facts) == list(raw)
    assert facts.to_json() == raw == facts
    assert Facts(facts).to_json() is not raw


@pytest.mark.parametrize("value", [None, 5, "x", [], ["a"], True])
def test_what_is_not_an_object_has_no_facts(value: object) -> None:
    assert Facts.from_json(value) == {}
