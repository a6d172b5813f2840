"""The readers of untrusted files, each with valid seeds and with what must hold if it accepts a file."""

from __future__ import annotations

import base64
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scoring.test_golden_scores import GOLDEN
from support import LLAMA_CONFIG, llama, raw_file, snapshot, write_folder

import neftsurgery as ns
from neftsurgery.checkpoint.adapter import AdaptedWeights
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.healing import plan_heal
from neftsurgery.checkpoint.unfinished import journal_path
from neftsurgery.checkpoint.weight_files import weight_files
from neftsurgery.errors import CorruptFileError
from neftsurgery.neurons.anatomy import read_anatomy
from neftsurgery.scoring.scores import Scores
from neftsurgery.selection.selection import Selection
from neftsurgery.sources.resolve import Source, resolve
from neftsurgery.tensors.header import read_header

from .mutate import mutate_bytes, mutate_safetensors, mutate_text
from .oracle import agrees, packages_view, stricter
from .patches import patch_targets
from .target import Target

__all__ = ["targets"]


def targets(root: Path, *, recipes: bool) -> Iterator[Target]:
    """Every reader, with its files in ``root``."""
    small = llama(hidden=4, ffn=6, layers=1, vocabulary=3, seed=0)
    config = {**LLAMA_CONFIG, "hidden_size": 4}
    write_folder(root / "base", small, 1, config)
    noise = np.random.default_rng(0)
    moved = {name: (a + noise.standard_normal(a.shape)).astype(np.float32) for name, a in small.items()}
    write_folder(root / "tuned", moved, 1, config)
    yield _header(root)
    yield _index(root)
    yield from patch_targets(root)
    yield from _documents(root)
    yield from _adapter(root)
    yield _config(root, config)
    yield _journal(root)
    if recipes:
        yield _recipe(root)


def _header(root: Path) -> Target:
    path = root / "header.safetensors"
    seeds = []
    ones = ("F64", np.ones(1, "u8"))
    for tensors in (
        {"a": ("F32", np.arange(6, dtype="u4").reshape(2, 3)), "b": ("BF16", np.arange(4, dtype="u2"))},
        {"s": ("U8", np.zeros((), "u1")), "e": ("F16", np.zeros((0, 3), "u2")), "z": ones},
        {},
    ):
        for metadata in (None, {"format": "pt", "k": "v"}):
            seeds.append(raw_file(path, tensors, metadata).read_bytes())

    def read(raw: bytes) -> None:
        theirs = packages_view(raw)
        try:
            header = read_header(path)
        except CorruptFileError:
            assert theirs is None or stricter(raw), "the safetensors package takes it"
            raise
        assert theirs is not None, "the safetensors package refuses it"
        agrees(header, raw, theirs)

    return Target("safetensors header", path, seeds, mutate_safetensors, read, 8)


def _index(root: Path) -> Target:
    folder = root / "sharded"
    write_folder(folder, {name: np.ones((2, 2), np.float32) for name in "abc"}, 2)
    (root / "secret.safetensors").write_bytes(b"")
    path = folder / "model.safetensors.index.json"

    def read(raw: bytes) -> None:
        files = weight_files(folder)
        found, listed = files.parts_of, files.listed
        weight_map = json.loads(raw)["weight_map"]
        assert listed == weight_map.keys()
        places = {os.path.realpath(folder / one) for one in found}
        assert places == {os.path.realpath(os.path.join(folder, name)) for name in weight_map.values()}
        assert {os.path.commonpath([one, folder]) for one in places} == {str(folder)}, "outside its folder"

    return Target("shard index", path, [path.read_bytes()], mutate_text, read, 8)


def _documents(root: Path) -> Iterator[Target]:
    base, tuned = root / "base", root / "tuned"
    ns.diff(base, tuned, out=root / "scores.0").close()
    ns.diff(base, tuned, anatomy="units", out=root / "scores.1").close()
    for number, text in enumerate(GOLDEN.values()):  # of both versions
        (root / f"scores.golden-{number}").write_bytes(zlib.decompress(base64.b64decode(text)))
    with ns.Scores.load(root / "scores.0") as scores:
        chosen = scores.select(neurons=9, with_bias=True)
    chosen.save(root / "selection.0")
    for number, reversible in enumerate((False, True)):
        ns.extract(base, tuned, chosen, reversible=reversible, out=root / f"patch.{number}").close()
    ns.extract(base, tuned, changed=True, include=["*"], out=root / "patch.2").close()

    def seeds(kind: str) -> list[bytes]:
        return [path.read_bytes() for path in sorted(root.glob(f"{kind}.*"))]

    def read_selection(raw: bytes) -> None:
        for chosen in Selection.load(root / "a-selection"):
            _check_index(chosen.index, chosen.layout.count)

    def read_scores(raw: bytes) -> None:
        with Scores.load(root / "some-scores") as scores:
            ns.inspect(root / "some-scores")
            for chosen in scores.select(neurons=2):
                _check_index(chosen.index, chosen.layout.count)

    for kind, path, read, share in (
        ("selection", root / "a-selection", read_selection, 1.5),
        ("scores", root / "some-scores", read_scores, 0.7),
    ):
        yield Target(kind, path, seeds(kind), mutate_safetensors, read, share)


def _check_index(index: np.ndarray, count: int) -> None:
    numbers = index.tolist()
    assert numbers == sorted(set(numbers)), "not ascending and unique"
    assert all(0 <= number < count for number in numbers), "out of range"


def _adapter(root: Path) -> Iterator[Target]:
    folder, base = root / "adapter", root / "base"
    ns.export_lora(root / "patch.1", folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good = config.read_bytes(), weights.read_bytes()
    opened = Checkpoint.read(resolve(base))

    def read(raw: bytes) -> None:
        adapted = AdaptedWeights.on(opened, resolve(folder))
        for name, info in list(adapted.tensors.items())[:4]:
            buffer = memoryview(bytearray(min(info.nbytes, 64)))
            adapted.read_into(name, 0, buffer)
        adapted.file.close()

    def read_one(other: Path, content: bytes) -> Callable[[bytes], None]:
        def both(raw: bytes) -> None:
            if other.read_bytes() != content:
                other.write_bytes(content)
            read(raw)

        return both

    patterned = json.loads(good[0]) | {"alpha_pattern": {"q_proj": 3}, "use_rslora": True}
    seeds = [good[0], json.dumps(patterned).encode()]
    yield Target("adapter config", config, seeds, mutate_text, read_one(weights, good[1]), 0.3)
    yield Target("adapter weights", weights, [good[1]], mutate_safetensors, read_one(config, good[0]), 0.3)


def _config(root: Path, config: dict[str, object]) -> Target:
    folder = root / "configured"
    shutil.copytree(root / "base", folder)
    seeds = [json.dumps(config | {"model_type": kind}).encode() for kind in ("llama", "gpt2", "mixtral", "?")]
    seeds.append(json.dumps({"text_config": config, "quantization_config": {"bits": 4}}).encode())

    def read(raw: bytes) -> None:
        opened = Checkpoint.read(resolve(folder))
        for kind in ("rows", "ffn", "units"):
            try:
                read_anatomy(kind, opened.tensors, opened.config)
            except ns.MismatchError:
                continue

    return Target("config.json", folder / "config.json", seeds, mutate_text, read, 0.3)


def _journal(root: Path) -> Target:
    """A journal planted beside a model: it is applied to that model alone, or not at all."""
    from neftsurgery.checkpoint import healing
    from neftsurgery.checkpoint import journal as journal_module

    folder = root / "model"
    shutil.copytree(root / "base", folder)
    path = journal_path(Source(folder, "model"))
    kept: list[bytes] = []
    removed, token = journal_module.remove_journal, journal_module.secrets.token_hex

    def keep(journal: Path, sha256: str) -> None:
        kept.append(journal.read_bytes())
        raise OSError("the journal is wanted")

    journal_module.remove_journal = healing.remove_journal = keep
    journal_module.secrets.token_hex = lambda nbytes: "0" * (2 * nbytes)  # else no run is like another
    try:
        ns.apply(folder, root / "patch.1", in_place=True)
    except ns.MachineError:
        pass
    finally:
        journal_module.remove_journal = healing.remove_journal = removed
        journal_module.secrets.token_hex = token
    shutil.rmtree(folder)
    shutil.copytree(root / "base", folder)
    before, weights = snapshot(folder), (folder / "model.safetensors").read_bytes()

    def read(raw: bytes) -> None:
        try:
            assert plan_heal(Source(folder, "model")).run().journals
        finally:
            path.unlink(missing_ok=True)
            if snapshot(folder) != before:
                (folder / "model.safetensors").write_bytes(weights)
                raise AssertionError("a journal has changed a model that was whole")

    return Target("journal", path, [kept[0]], mutate_safetensors, read, 0.5)


def _recipe(root: Path) -> Target:
    from neftsurgery.training.recipe_reader import read_recipe

    path = root / "recipe.yaml"
    whole: dict[str, Any] = {
        "model": "base",
        "out": "run",
        "data": {"train": "mine.jsonl", "eval_share": 0.1, "limit": 3},
        "probe": {"by": "gradients", "steps": 2},
        "select": {"neurons": "3%", "axis": {"*": 0}, "only": ["a*"], "seed": 1},
        "train": {"epochs": 3, "learning_rate": "2e-5", "more": {"optim": "sgd"}},
    }
    seeds = [
        b"model: base\nout: run\ndata: {train: mine.jsonl}\nselect: {neurons: 3%}\ntrain: {epochs: 3}\n",
        b"model: base\nout: run\ndata:\n  train: x.jsonl\nprobe:\n  by: tuned\n  path: tuned\n"
        b"select:\n  changed: true\n  only:\n  - '*.up_proj.*'\n",
        json.dumps(whole, indent=1).encode(),
    ]

    def mutate(rng: Any, data: bytes, others: Sequence[bytes]) -> bytes:
        return mutate_text(rng, data, others) if data[:1] == b"{" else mutate_bytes(rng, data, others)

    def read(raw: bytes) -> None:
        recipe = read_recipe(path)
        assert recipe.model
        assert recipe.to_json()["out"]

    return Target("recipe", path, seeds, mutate, read, 0.05)
