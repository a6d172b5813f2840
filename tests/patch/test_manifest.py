"""The manifest of a patch as a value."""

from __future__ import annotations

from neftsurgery import __version__
from neftsurgery.checkpoint.provenance import Provenance
from neftsurgery.patch.patch import Manifest
from neftsurgery.selection.selection import SelectionFacts

BASE, FACTS = Provenance({"name": "base", "fingerprint": None}), SelectionFacts({"score": "cosine"})


def test_a_new_one_is_written_in_the_order_of_the_format() -> None:
    manifest = Manifest.of(BASE, FACTS, {"training": {"steps": 3}})
    assert (manifest.base, manifest.selection, manifest.training) == (BASE, FACTS, {"steps": 3})
    assert list(manifest.written({"w": {}}).items()) == [
        ("version", 2),
        ("kind", "neurons"),
        ("base", {"name": "base", "fingerprint": None}),
        ("selection", {"score": "cosine"}),
        ("created_by", f"neftsurgery {__version__}"),
        ("training", {"steps": 3}),
        ("tensors", {"w": {}}),
    ]


def test_what_a_stranger_wrote_is_kept_but_for_the_tensors() -> None:
    raw = {"tensors": {"old": 1}, "base": 5, "version": 1, "selection": [], "theirs": {"a": None}}
    manifest = Manifest.from_json(raw)
    assert manifest.base == manifest.selection == manifest.training == {}
    assert manifest.to_json() == raw
    raw |= {"kind": "lossless", "content_hash": "of another file", "groups": [{}]}
    written = Manifest.from_json(raw).written({})
    assert written == {"version": 2, "kind": "neurons", "base": 5, "selection": [], "theirs": {"a": None}} | {
        "tensors": {}
    }
