"""apply and revert of lossless patches: the other checkpoint comes back, byte for byte, or nothing does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lossless_support import BITS, contents, folder, tensor, touched, unchanged
from safetensors.numpy import save_file

import neftsurgery as ns

RNG = np.random.default_rng(0)
FILES = {"config.json": b'{"a": 1}', "tokenizer.json": b"{}", "merges.txt": b""}
BASE = {
    "a.weight": tensor("BF16", (64, 50), RNG),
    "b.weight": tensor("F32", (9, 70), RNG),
    "c": tensor("I64", (), RNG),
    "only.base": tensor("F16", (5,), RNG),
    "empty": tensor("F32", (0, 4), RNG),
}
TUNED = {name: touched(one, 0.3, RNG) for name, one in BASE.items() if name != "only.base"}
TUNED["only.tuned"] = tensor("F8_E4M3", (3, 3), RNG)


def round_trip(base: Path, tuned: Path, root: Path, **options: bool) -> None:
    """Base plus patch is tuned, tuned plus patch is tuned, and both ways back give the base."""
    ns.extract(base, tuned, lossless=True, reversible=True, out=root / "p", **options).close()
    back = {"base": base}
    for number, (verb, source, target, more) in enumerate(
        (
            (ns.apply, base, tuned, {}),
            (ns.apply, tuned, tuned, {}),
            (ns.revert, tuned, base, {}),
            (ns.revert, base, base, {}),
            (ns.revert, tuned, base, back),
        )
    ):
        out = root / f"out{number}"
        verb(source, root / "p", out=out, **more)
        assert contents(out) == contents(target), (number, verb)
    assert ns.verify(base, root / "p").state in ("base", "patched")
    assert ns.verify(tuned, root / "p").state == "patched"
    assert ns.verify(root / "out2", root / "p").state == ns.verify(base, root / "p").state


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shards", [(1, 1), (1, 3), (3, 2)])
def test_tensors_that_only_one_side_has_and_other_shards(
    tmp_path: Path, shards: tuple[int, int], fast: bool
) -> None:
    sides = [
        folder(tmp_path / name, tensors, count, FILES | {"vocab.txt": name.encode()}, {"from": name})
        for name, tensors, count in zip(("base", "tuned"), (BASE, TUNED), shards, strict=True)
    ]
    round_trip(*sides, tmp_path, fast=fast)


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(1)
    base = {
        name: tensor(dtype, shape, rng) for name, shape in {"m": (8, 12), "v": (16,), "e": (4, 0)}.items()
    }
    if BITS[dtype] >= 8:
        base["s"] = tensor(dtype, (), rng)
    tuned = {name: touched(one, 0.1 if name == "m" else 1, rng) for name, one in base.items()}
    sides = folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)
    round_trip(*sides, tmp_path)


@pytest.mark.parametrize("rows", [30, 41, 55, 0])
def test_a_vocabulary_that_grew_or_shrank(tmp_path: Path, rows: int) -> None:
    """The common part is compared; what is new is stored."""
    rng = np.random.default_rng(2)
    width = 30_000  # the block of 2^20 elements ends within the 35th row
    long = tensor("U8", (56, width), rng)
    base = {"embed": ("U8", (41, width), long[2][: 41 * width]), "w": tensor("F32", (3,), rng)}
    tuned = {"embed": touched(("U8", (rows, width), long[2][: rows * width]), 1e-4, rng), "w": base["w"]}
    sides = folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)
    round_trip(*sides, tmp_path)
    new = max(0, rows - 41) * width + max(0, 41 - rows) * width
    assert (tmp_path / "p").stat().st_size < new + 20_000


def test_another_dtype_or_shape_under_the_same_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    base = {"a": tensor("F32", (6, 8), rng), "b": tensor("F16", (6, 8), rng), "c": tensor("F16", (4, 4), rng)}
    tuned = {"a": tensor("BF16", (6, 8), rng), "b": tensor("F16", (48,), rng), "c": base["c"]}
    sides = folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)
    round_trip(*sides, tmp_path)


@pytest.mark.parametrize("kinds", ["file file", "file folder", "folder file"])
def test_single_files_and_folders(tmp_path: Path, kinds: str) -> None:
    base = folder(tmp_path / "base", BASE, 1, FILES)
    tuned = folder(tmp_path / "tuned", TUNED, 1, FILES)
    first, second = kinds.split()
    one = base / "model.safetensors" if first == "file" else base
    two = tuned / "model.safetensors" if second == "file" else tuned
    shutil.copy(two, tmp_path / "one") if second == "file" else None
    two = tmp_path / "one" if second == "file" else two
    ns.extract(one, two, lossless=True, reversible=True, out=tmp_path / "p").close()
    ns.apply(one, tmp_path / "p", out=tmp_path / "out")
    ns.revert(two, tmp_path / "p", out=tmp_path / "back")
    assert contents(tmp_path / "out") == contents(two)
    assert contents(tmp_path / "back") == contents(one)


def odd_headers() -> dict[str, bytes]:
    """Files of the same tensors that the safetensors package reads, and that differ in their bytes."""
    data = np.arange(24, dtype="<u2").tobytes()
    plain = {
        "a": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]},
        "z": {"dtype": "F16", "shape": [0], "data_offsets": [24, 24]},
        "b": {"dtype": "I16", "shape": [12], "data_offsets": [24, 48]},
    }
    other = {
        "b": plain["b"],
        "__metadata__": {"k": "é\n\"'", "format": "pt"},
        "a": plain["a"],
        "z": plain["z"],
    }
    texts = {
        "compact": json.dumps(plain, separators=(",", ":")),
        "wide": json.dumps(plain, indent=3),
        "padded": json.dumps(plain) + " " * 3000,
        "another order, metadata": json.dumps(other),
        "not ASCII": json.dumps(other, ensure_ascii=False),
    }
    return {
        name: len(text.encode()).to_bytes(8, "little") + text.encode() + data for name, text in texts.items()
    }


@pytest.mark.parametrize("name", odd_headers())
def test_headers_come_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    base.write_bytes(odd_headers()["compact"])
    tuned.write_bytes(odd_headers()[name])
    round_trip(base, tuned, tmp_path)
    assert (tmp_path / "out0").read_bytes() == odd_headers()[name]


def test_what_transformers_saves(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    config = LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, **shape)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 2
    round_trip(tmp_path / "base", tmp_path / "tuned", tmp_path)


def test_what_the_safetensors_package_saves(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    arrays = {
        "w": rng.standard_normal((20, 30)).astype(np.float32),
        "n": np.array([np.nan, -0.0, 0.0, np.inf]),
    }
    save_file(arrays, tmp_path / "base")
    arrays["w"][3] += np.float32(1e-3)
    arrays["n"][:] = arrays["n"][[2, 1, 1, 0]]
    save_file(arrays, tmp_path / "tuned", {"note": "x"})
    round_trip(tmp_path / "base", tmp_path / "tuned", tmp_path)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, tuned, and a patch between them that is not reversible."""
    base = folder(tmp_path / "base", BASE, 2, FILES)
    tuned = folder(tmp_path / "tuned", TUNED, 2, FILES | {"config.json": b'{"a": 2}'})
    ns.extract(base, tuned, lossless=True, out=tmp_path / "p").close()
    return base, tuned, tmp_path / "p"


def with_byte(path: Path, out: Path, where: int) -> Path:
    """A copy of a folder, one byte of one weight file changed."""
    shutil.copytree(path, out)
    file = sorted(out.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[where] ^= 4
    file.write_bytes(content)
    return out


def test_another_base_is_refused_before_anything_is_written(sides, tmp_path: Path, neft) -> None:
    with_byte(sides[0], tmp_path / "other", -1)
    with unchanged(tmp_path):
        for words in (("apply", "other", "p"), ("revert", "other", "p", "--base", "base")):
            done = neft(*words, "-o", "out")
            assert done.code == 3
            assert "fingerprint" in done.err
            assert ("expected base" if words[0] == "apply" else "expected tuned") in done.err
        assert neft("revert", "tuned", "p", "--base", "other", "-o", "out").code == 3


def test_a_base_whose_fingerprint_does_not_show_its_change(tmp_path: Path, neft) -> None:
    """The fingerprint is over the ends of tensors only; the hashes of blocks are over all."""
    rng = np.random.default_rng(5)
    base = {"w": tensor("F32", (100, 100), rng)}
    tuned = {"w": touched(base["w"], 0.1, rng)}
    paths = folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)
    ns.extract(*paths, lossless=True, out=tmp_path / "p").close()
    with_byte(paths[0], tmp_path / "other", -20_000)
    with unchanged(tmp_path):
        for words in (("apply", "other", "p"), ("revert", "tuned", "p", "--base", "other")):
            done = neft(*words, "-o", "out")
            assert (done.code, "was made from another checkpoint" in done.err) == (3, True), done.err
            assert "tensor w" in done.err
        assert neft("verify", "other", "p").code == 3


def test_the_way_back_needs_the_base_or_a_reversible_patch(sides, tmp_path: Path, neft) -> None:
    with unchanged(tmp_path):
        done = neft("revert", "tuned", "p", "-o", "out")
        assert (done.code, "--base" in done.err, "--reversible" in done.err) == (2, True, True)
        done = neft("revert", "tuned", "p", "--in-place")
        assert (done.code, "--base" in done.err, "--reversible" in done.err) == (2, True, True)
        for words in (("apply", "base", "p"), ("revert", "tuned", "p", "--base", "base")):
            done = neft(*words)
            assert (done.code, "--in-place" in done.err) == (2, True), done.err


def test_a_file_beside_the_weights_that_is_gone_or_another(sides, tmp_path: Path, neft) -> None:
    """What the base has too is not in the patch: it must be there, as it was."""
    base, tuned, patch = sides
    for content in (b"{ }", b"[]", None):
        if content is None:
            (base / "tokenizer.json").unlink()
        else:
            (base / "tokenizer.json").write_bytes(content)
        with unchanged(tmp_path):
            done = neft("apply", "base", "p", "-o", "out")
            assert (done.code, "tokenizer.json" in done.err) == (3, True)
    (base / "tokenizer.json").write_bytes(FILES["tokenizer.json"])
    (base / "config.json").unlink()
    (base / "merges.txt").unlink()
    ns.apply(base, patch, out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tuned)


def test_verify_tells_all_states(sides, tmp_path: Path, neft) -> None:
    base, tuned, patch = sides
    states = {"base": base, "patched": tuned, "neither": with_byte(base, tmp_path / "other", -1)}
    mixed = dict(BASE) | {"a.weight": TUNED["a.weight"]}
    states["mixed"] = folder(tmp_path / "mixed", mixed)
    for state, path in states.items():
        assert ns.verify(path, patch).state == state
    assert neft("verify", "tuned", "p", "--json").json["state"] == "patched"
    shutil.rmtree(mixed_path := tmp_path / "mixed")
    fewer = {name: one for name, one in BASE.items() if name != "only.base"}
    for tensors in ({**TUNED, "only.base": BASE["only.base"]}, fewer):
        folder(mixed_path, tensors)
        assert ns.verify(mixed_path, patch).state == "mixed", "a tensor too many or too few"
        shutil.rmtree(mixed_path)


def test_other_verbs_refuse_it_in_a_sentence(sides, tmp_path: Path, neft) -> None:
    patch = sides[2]
    with unchanged(tmp_path):
        with pytest.raises(ns.MismatchError, match="lossless"):
            ns.Patch.load(patch)
        for words in (
            ("merge", "p", "-o", "x"),
            ("merge", "p", "p", "-o", "x"),
            ("export", "p", "--to", "lora", "-o", "x"),
        ):
            done = neft(*words)
            assert (done.code, "lossless" in done.err) == (3, True), done.err
            assert "Traceback" not in done.err
        torch = pytest.importorskip("torch")
        with pytest.raises(ns.MismatchError, match="lossless"):
            ns.attach(torch.nn.Linear(2, 2), patch)


def test_a_long_chain(tmp_path: Path) -> None:
    """More links than Python has levels of calls; unchanged files go back to the base's."""
    rng = np.random.default_rng(6)
    tensors, links = {"w": tensor("U8", (40,), rng)}, 700
    here = base = folder(tmp_path / "0", tensors, 1, FILES)
    patches = []
    for number in range(3):
        tensors = {"w": touched(tensors["w"], 0.2, rng)}
        there = folder(tmp_path / str(number + 1), tensors, 1, FILES)
        patches.append(ns.extract(here, there, lossless=True, out=tmp_path / f"p{number}"))
        here = there
    back = ns.extract(here, base, lossless=True, out=tmp_path / "p3")
    ns.apply(base, [*patches, back] * (links // 4) + patches[:1], out=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "1")
    for patch in (*patches, back):
        patch.close()
