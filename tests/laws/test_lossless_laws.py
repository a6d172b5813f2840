"""The laws of lossless patches: base plus patch is the tuned checkpoint byte for byte, and back again.

For random checkpoints: names, shapes, dtypes, shards, headers, tensors of one side only, files beside them.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lossless_support import BITS, Tensors, contents, folder, tensor, touched

import neftsurgery as ns

law = settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))

NAMES = ["layers.0.w", "layers.1.w", "a:code", "forward:form", "../../etc/passwd", "gewicht ⚖ [0]*", "code"]
FILES = ["config.json", "vocab.txt", "chat_template.jinja", "merges.txt"]


@st.composite
def pairs(draw: st.DrawFn) -> list[Tensors]:
    """Two checkpoints with at least one tensor in common that can be compared."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sides: list[Tensors] = [{}, {}]
    for number, name in enumerate(
        draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True))
    ):
        dtype = draw(st.sampled_from(list(BITS)))
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3))) if number else (3,)
        shape = (*shape, 8) if BITS[dtype] < 8 else shape
        one = tensor(dtype, shape, rng)
        kind = draw(st.sampled_from(["touched", "same", "noise", "first", "second", "longer", "other"]))
        kind = kind if number else "touched"
        if kind != "second":
            sides[0][name] = one
        if kind in ("touched", "same"):
            sides[1][name] = touched(one, draw(st.sampled_from([0.05, 0.5])) if kind == "touched" else 0, rng)
        elif kind in ("noise", "second"):
            sides[1][name] = tensor(dtype, shape, rng)
        elif kind == "longer" and shape:
            sides[1][name] = tensor(dtype, (shape[0] + draw(st.sampled_from([0, 8, 16])), *shape[1:]), rng)
        elif kind == "other":
            sides[1][name] = tensor("F16", (*shape, 2), rng)
    return sides if draw(st.booleans()) else sides[::-1]


@st.composite
def written(draw: st.DrawFn) -> list[tuple[Tensors, int, dict[str, bytes], dict[str, str] | None]]:
    metadata = st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2)
    files = st.dictionaries(st.sampled_from(FILES), st.sampled_from([b"", b"a", b"{}" * 99]), max_size=4)
    return [
        (tensors, min(len(tensors), draw(st.integers(1, 3))), draw(files), draw(metadata))
        for tensors in draw(pairs())
    ]


@law
@given(sides=written(), fast=st.booleans(), reversible=st.booleans())
def test_there_and_back_again(sides, fast: bool, reversible: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base, tuned = (
            folder(root / place, *side) for place, side in zip(("base", "tuned"), sides, strict=True)
        )
        before = contents(base), contents(tuned)
        patch = ns.extract(base, tuned, lossless=True, fast=fast, reversible=reversible, out=root / "p")
        ns.apply(base, patch, out=root / "out")
        assert contents(root / "out") == before[1]
        ns.revert(root / "out", patch, base=None if reversible else base, out=root / "back")
        assert contents(root / "back") == before[0]
        assert (contents(base), contents(tuned)) == before
        assert ns.verify(root / "out", patch).state == "patched"
        patch.close()


@law
@given(sides=written(), more=st.integers(0, 2**32))
def test_a_chain_equals_its_last(sides, more: int) -> None:
    """From base over tuned to a third checkpoint, and the patch from base to the third."""
    rng = np.random.default_rng(more)
    tensors, shards, files, metadata = sides[1]
    third = ({name: touched(one, 0.2, rng) for name, one in tensors.items()}, shards, files, metadata)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        paths = [folder(root / str(k), *side) for k, side in enumerate((*sides, third))]
        first = ns.extract(paths[0], paths[1], lossless=True)
        second = ns.extract(paths[1], paths[2], lossless=True, fast=bool(more % 2))
        for start in (0, 1, 2):
            ns.apply(paths[start], [first, second], out=root / f"out{start}")
            assert contents(root / f"out{start}") == contents(paths[2])
        first.close()
        second.close()


@law
@given(sides=written())
def test_what_a_patch_says_is_json_and_true(sides) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base, tuned = (
            folder(root / place, *side) for place, side in zip(("base", "tuned"), sides, strict=True)
        )
        with ns.extract(base, tuned, lossless=True) as patch:
            weights = patch.weights()
            json.dumps({name: asdict(facts) for name, facts in weights.items()})
            assert weights.keys() == sides[1][0].keys()
            for name, facts in weights.items():
                dtype, shape, data = sides[1][0][name]
                assert (facts.tensors, facts.tuned_bytes) == (1, len(data))
                size = max(1, {"C64": 4}.get(dtype, BITS[dtype] // 8))
                old = sides[0][0].get(name, (dtype, (), b""))
                alike = old[0] == dtype and len(old[1]) == len(shape) and old[1][1:] == shape[1:]
                theirs = old[2][: len(data)].ljust(len(data), b"\0") if alike and old[2] else None
                new = np.frombuffer(data, np.uint8).reshape(-1, size)
                if theirs is None:
                    assert facts.changed == len(new)
                else:
                    differs = (np.frombuffer(theirs, np.uint8).reshape(-1, size) != new).any(axis=1)
                    assert facts.changed == differs.sum()
