"""extract, lossless: what is carried, what is named as not carried, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lossless_support import Counted, contents, folder, tensor, touched, unchanged
from safetensors import safe_open
from support import raw_file

import neftsurgery as ns
from neftsurgery.patch.lossless import LosslessPatch
from neftsurgery.storage.threads import Limits
from neftsurgery.surgery.lossless import plan_lossless

RNG = np.random.default_rng(0)
BASE = {
    "layers.0.weight": tensor("BF16", (30, 40), RNG),
    "layers.1.weight": tensor("BF16", (30, 40), RNG),
    "norm": tensor("F32", (17,), RNG),
}
TUNED = {name: touched(one, 0.2, RNG) for name, one in BASE.items()}
FILES = {"config.json": b'{"a": 1}', "vocab.txt": b"a b c", "merges.txt": b""}


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    return folder(tmp_path / "base", BASE, 1, FILES), folder(tmp_path / "tuned", TUNED, 2, FILES)


def manifest(path: Path) -> dict:
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["neuron_patch"])


def test_code_and_pickles_are_named_and_not_carried(sides: tuple[Path, Path], tmp_path: Path, neft) -> None:
    _, tuned = sides
    for name in ("modeling_evil.py", "pytorch_model.bin", "README.md"):
        (tuned / name).write_bytes(b"x")
    (tuned / "onnx").mkdir()
    (tuned / ".hidden").write_text("x")
    with open(tuned / "tokenizer.json", "wb") as file:
        file.truncate((64 << 20) + 1)  # too large to be carried
    done = neft("extract", "base", "tuned", "-o", "p", "--lossless", "--json")
    expected = [
        "README.md",
        "modeling_evil.py",
        "onnx",
        "pytorch_model.bin",
        "tokenizer.json",
    ]
    assert done.code == 0
    assert done.json["not_carried"] == expected
    assert "modeling_evil.py" in done.err
    assert done.json["bytes"] == (tmp_path / "p").stat().st_size
    with LosslessPatch.load(tmp_path / "p") as patch:
        assert list(patch.not_carried) == expected
        names = [one.name for one in patch.forward.side]
        assert names == ["config.json", "merges.txt", "model.safetensors.index.json", "vocab.txt"]
    done = neft("apply", "base", "p", "-o", "out")
    assert "pytorch_model.bin" in done.err
    assert contents(tmp_path / "out").items() < contents(tuned).items()


def test_weights_only_leaves_the_other_files_to_the_base(sides: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = sides
    (base / "config.json").write_text('{"b": 2}')
    (base / "README.md").write_text("of the base")
    with ns.extract(base, tuned, lossless=True, weights_only=True, out=tmp_path / "p") as patch:
        assert [one.name for one in patch.forward.side] == ["model.safetensors.index.json"]
        assert list(patch.not_carried) == ["config.json", "merges.txt", "vocab.txt"]
    ns.apply(base, tmp_path / "p", out=tmp_path / "out")
    found, expected = contents(tmp_path / "out"), contents(tuned)
    for name in ("config.json", "README.md"):
        assert found.pop(name) == contents(base)[name]
    expected.pop("config.json")
    assert found == expected


def test_a_file_that_the_base_has_too_takes_no_room(sides: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = sides
    noise = np.random.default_rng(1).bytes(100_000)
    for side in sides:
        (side / "tokenizer.json").write_bytes(noise)
    with ns.extract(base, tuned, lossless=True, out=tmp_path / "p") as patch:
        packed = {one.name: one.packed for one in patch.forward.side}
    assert packed["tokenizer.json"] == packed["config.json"] == 0
    assert packed["merges.txt"] > 0, "an empty file is not told from a missing one by its size"
    assert (tmp_path / "p").stat().st_size < 50_000


def test_threads_and_memory_change_no_byte(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    base = {f"w.{n}": tensor("U8", (1 << 20, 3), rng) for n in range(2)}
    tuned = {name: touched(one, 0.01 * n, rng) for n, (name, one) in enumerate(base.items())}
    sides = folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)
    for number, (threads, memory) in enumerate(((1, None), (3, None), (8, 16 << 20))):
        limits = Limits.of(threads, memory)
        plan_lossless(*sides, out=tmp_path / f"p{number}").run(limits=limits).close()
        ns.apply(sides[0], tmp_path / f"p{number}", out=tmp_path / f"out{number}", threads=threads)
        assert contents(tmp_path / f"out{number}") == contents(sides[1])
    assert len({(tmp_path / f"p{number}").read_bytes() for number in range(3)}) == 1


@pytest.mark.parametrize("reversible", [False, True])
def test_progress_adds_up(sides: tuple[Path, Path], tmp_path: Path, reversible: bool) -> None:
    base, tuned = sides
    patch = tmp_path / "p"
    seen = []

    def counted() -> Counted:
        seen.append(Counted())
        return seen[-1]

    ns.extract(base, tuned, lossless=True, reversible=reversible, out=patch, progress=counted()).close()
    ns.apply(base, patch, out=tmp_path / "out", progress=counted())
    ns.verify(base, patch, progress=counted())
    ns.revert(tuned, patch, base=base, out=tmp_path / "back", progress=counted())
    assert [list(one.stages) for one in seen] == [
        ["coding"],
        ["writing"],
        ["checking"],
        ["writing"],
    ]
    for one in seen:
        for total, done in one.stages.values():
            assert done == total > 0


def test_a_dry_run_writes_nothing(sides: tuple[Path, Path], tmp_path: Path, neft) -> None:
    with unchanged(tmp_path):
        done = neft("extract", "base", "tuned", "-o", "p", "--lossless", "--dry-run", "--json")
        assert done.code == 0
        assert (done.json["lossless"], done.json["dry_run"], done.json["tensors"]) == (True, True, 3)
    assert neft("extract", "base", "tuned", "-o", "p", "--lossless", "--reversible").code == 0
    with unchanged(tmp_path):
        for words in (("apply", "base"), ("revert", "tuned")):
            done = neft(*words, "p", "-o", "out", "--dry-run", "--json")
            assert done.code == 0
            assert "config.json" in done.json["files"]
            assert "would write" in neft(*words, "p", "-o", "out", "--dry-run").out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--lossless", "--neurons", "3%"), "--neurons does not go with --lossless"),
        (("--lossless", "--changed"), "--changed does not go with --lossless"),
        (("--lossless", "--seed", "3"), "--seed does not go with --lossless"),
        (("--lossless", "--scores", "s"), "--scores does not go with --lossless"),
        (("--lossless", "--selection", "s"), "--selection does not go with --lossless"),
        (("--lossless", "--anatomy", "ffn"), "--anatomy does not go with --lossless"),
        (("--lossless", "--strip-prefix", "model."), "--strip-prefix does not go with --lossless"),
        (("--lossless", "--include", "*"), "--include does not go with --lossless"),
        (("--fast",), "--fast is for --lossless patches only"),
        (("--weights-only",), "--weights-only is for --lossless patches only"),
    ],
)
def test_options_that_do_not_go_together(
    sides: tuple[Path, Path], tmp_path: Path, neft, words: tuple[str, ...], says: str
) -> None:
    with unchanged(tmp_path):
        done = neft("extract", "base", "tuned", "-o", "p", *words)
        assert (done.code, says in done.err) == (2, True), done.err


def test_keywords_that_do_not_go_together(sides: tuple[Path, Path]) -> None:
    for options in (
        {"neurons": 3},
        {"anatomy": "ffn"},
        {"scores": "s"},
        {"selection": "s"},
        {"strip_prefix": "m."},
    ):
        with pytest.raises(ns.UsageError, match=f"{next(iter(options))} does not go with lossless"):
            ns.extract(*sides, lossless=True, **options)
    with pytest.raises(ns.UsageError, match="fast is for lossless"):
        ns.extract(*sides, changed=True, fast=True)


def test_outputs_that_would_replace_an_input(sides: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with unchanged(tmp_path):
        for out in (
            sides[0],
            sides[1] / "p",
            sides[1] / "config.json",
            tmp_path / "taken",
            tmp_path / "no" / "p",
        ):
            with pytest.raises(ns.UsageError):
                ns.extract(*sides, lossless=True, out=out)
    ns.extract(*sides, lossless=True, out=tmp_path / "taken", force=True).close()
    assert manifest(tmp_path / "taken")["kind"] == "lossless"


def test_sides_that_have_nothing_in_common(sides: tuple[Path, Path], tmp_path: Path) -> None:
    other = folder(tmp_path / "other", {"else": BASE["norm"], "norm": tensor("F32", (3, 4), RNG)})
    with pytest.raises(ns.MismatchError, match="no tensor in common"):
        ns.extract(sides[0], other, lossless=True)


def test_a_header_of_little_but_padding_is_refused(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """A patch of a few kilobytes must not ask its readers for gigabytes: what is written can be read."""
    raw = raw_file(tmp_path / "one", [(n, d, list(s), b) for n, (d, s, b) in TUNED.items()]).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for padding, fits in ((1 << 20, True), (8 << 20, False)):
        path = tmp_path / f"padded{padding}"
        text = raw[8 : 8 + length] + b" " * padding
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        if fits:
            ns.extract(sides[0], path, lossless=True, out=tmp_path / "p").close()
            ns.apply(sides[0], tmp_path / "p", out=tmp_path / "out")
            assert (tmp_path / "out").read_bytes() == path.read_bytes()
        else:
            with pytest.raises(ns.MismatchError, match="too large for what they describe"):
                ns.extract(sides[0], path, lossless=True, out=tmp_path / "q")


def test_a_patch_without_a_name_works_as_one_with_a_name(sides: tuple[Path, Path], tmp_path: Path) -> None:
    with ns.extract(*sides, lossless=True) as patch:
        assert patch.path is None
        assert "(not saved)" in str(patch)
        ns.apply(sides[0], patch, out=tmp_path / "out")
        assert ns.verify(sides[1], patch).state == "patched"
    assert contents(tmp_path / "out") == contents(sides[1])


def test_more_kinds_of_tensor_than_tables(tmp_path: Path) -> None:
    """Each name is a kind of its own; all have few changes, and share a table."""
    rng = np.random.default_rng(3)
    base = {f"tensor{'x' * (n % 7)}.{chr(97 + n % 26)}{n}w": tensor("F16", (6,), rng) for n in range(300)}
    tuned = {name: touched(one, 0.3, rng) for name, one in base.items()}
    sides = folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)
    with ns.extract(*sides, lossless=True, out=tmp_path / "p") as patch:
        assert len(patch.forward.tables) == 1
    ns.apply(sides[0], tmp_path / "p", out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(sides[1])


def test_names_are_compared_as_they_are_and_files_beside_are_only_bytes(tmp_path: Path) -> None:
    """A prefix is not looked for, as it could not be changed: what has another name is another tensor."""
    rng = np.random.default_rng(4)
    tensors = {f"layers.{n}.w": tensor("F16", (6, 5), rng) for n in range(3)}
    tuned = {f"model.{name}": one for name, one in tensors.items()}
    head = {"head": tensor("F16", (3,), rng)}
    sides = [
        folder(tmp_path / "base", tensors | head, 1, {"config.json": b"not JSON"}),
        folder(tmp_path / "tuned", tuned | head, 1, {"config.json": b"{" * 9}),
    ]
    ns.extract(*sides, lossless=True, out=tmp_path / "p").close()
    ns.apply(sides[0], tmp_path / "p", out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(sides[1])
    other = folder(tmp_path / "other", tuned)
    with pytest.raises(ns.MismatchError, match="no tensor in common"):
        ns.extract(sides[0], other, lossless=True)
