"""The numbers that commands print, beside counts of the same in files; sizes, beside what is written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from support import patch_manifest, patch_rows, write_file, write_folder

SHAPES = {f"layers.{n}.{kind}": shape for n in range(3) for kind, shape in
          {"up": (24, 16), "down": (16, 24), "gate": (24, 16)}.items()}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """``base``, ``one`` (all changed) and ``two`` (layers 0 and 1), with biases and other files."""
    rng = np.random.default_rng(5)
    base = {}
    for name, shape in SHAPES.items():
        base[f"{name}.weight"] = rng.standard_normal(shape).astype(np.float16)
        base[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(np.float16)
    for name, layers in (("base", ""), ("one", "012"), ("two", "01")):
        tensors = {
            key: (array + rng.standard_normal(array.shape) / 9).astype(np.float16)
            if key.split(".")[1] in layers
            else array
            for key, array in base.items()
        }
        write_folder(tmp_path / name, tensors, 2, {"model_type": "none"})
        (tmp_path / name / "tokenizer.json").write_text("{}" * 3000)
        (tmp_path / name / "sub").mkdir()
        (tmp_path / name / "sub" / "modules.json").write_text("[]" * 99)
        (tmp_path / name / "old.bin").write_bytes(b"stale" * 99)
    return tmp_path


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(file.stat().st_size for file in files)


def neurons_of(*patches: Path, weights_only: bool = True) -> set[tuple[str, int]]:
    """The neurons of patches, read by the safetensors package: tensor and number."""
    found = set()
    for path in patches:
        rows = patch_rows(path)
        for name in patch_manifest(path)["tensors"]:
            if not (weights_only and name.endswith(".bias")):
                found |= {(name, int(i)) for i in rows[f"{name}:index"][1]}
    return found


def tensors_of(neurons: Iterable[tuple[str, int]]) -> int:
    return len({name for name, _ in neurons})


@pytest.fixture
def patches(models: Path, neft: Any) -> tuple[Path, Path]:
    """Two patches of ``base`` with companion biases, and some neurons in common."""
    assert neft("extract", "base", "one", "-o", "p", "--neurons", "90", "--with-bias").code == 0
    assert neft("extract", "base", "two", "-o", "q", "--neurons", "70", "--with-bias").code == 0
    p, q = models / "p", models / "q"
    assert neurons_of(p) & neurons_of(q)
    assert len(neurons_of(p, weights_only=False)) == 180
    return p, q


def test_what_two_patches_have_in_common(patches: tuple[Path, Path], neft: Any) -> None:
    p, q = patches
    (found,) = neft("inspect", "p", "q", "--json").json["overlaps"]
    common = neurons_of(p) & neurons_of(q)
    everything = [neurons_of(one, weights_only=False) for one in patches]
    assert found["neurons"] == len(common)
    both = {name for name, _ in everything[0]} & {name for name, _ in everything[1]}
    assert found["tensors"] == sorted(both)
    assert found["shared"] == sorted({name for name, _ in everything[0] & everything[1]})
    where = f"in {len(found['shared'])} of the {len(both)} tensors that both touch"
    assert f"{len(common)} neurons in common, {where}" in neft("inspect", "p", "q").out
    random = ("--neurons", "20", "--policy", "random")
    assert neft("extract", "base", "one", "-o", "few", *random).code == 0
    (found,) = neft("inspect", "p", "few", "--json").json["overlaps"]
    assert len(found["shared"]) < len(found["tensors"])
    told = neft("merge", "p", "q", "-o", "m", "--on-overlap", "first", "--json").json
    assert (told["shared"], told["neurons"]) == (len(common), len(neurons_of(p, q)))
    assert neft("inspect", "m", "--json").json["neurons"] == len(neurons_of(p, q))


def test_a_neuron_that_two_patches_replace_is_one_neuron(patches: tuple[Path, Path], neft: Any) -> None:
    p, _ = patches
    expected = neurons_of(p)
    assert neft("apply", "base", "p", "-o", "patched").code == 0
    for words in (("base", "p", "p"), ("patched", "p"), ("base", "p", "p", "p")):
        told = neft("apply", *words, "-o", "out", "--force", "--json").json
        assert (told["neurons"], told["selected"]) == (len(expected), len(expected))
        assert told["tensors"] == tensors_of(neurons_of(p, weights_only=False))
        said = neft("apply", *words, "-o", "out", "--force").out
        assert said.startswith(f"out: {len(expected)} neurons in {told['tensors']} tensors are now")
    found = neft("verify", "out", "p", "--json").json
    assert (found["neurons"], len(found["tensors"])) == (len(neurons_of(p)), 18)
    assert neft("verify", "out", "p").out.startswith(f"patched: {len(neurons_of(p))} neurons in 18 tensors")
    told = neft("revert", "out", "p", "--base", "base", "-o", "back", "--json").json
    assert told["neurons"] == len(neurons_of(p))


def test_a_dry_run_of_a_patch_says_the_bytes_that_are_then_written(
    patches: tuple[Path, Path], models: Path, neft: Any
) -> None:
    extracts = [("extract", "base", "one", *how) for how in (
        ("--neurons", "5"), ("--neurons", "5", "--with-bias"), ("--changed", "--include", "*"),
        ("--neurons", "30%", "--reversible"),
    )]  # fmt: skip
    merges = [("merge", "p", "q", "--on-overlap", rule, *more) for rule, *more in (
        ("first",), ("mean",), ("sum", "--base", "base", "--reversible"), ("ties", "--base", "base"),
    )]  # fmt: skip
    for number, words in enumerate([*extracts, *merges]):
        dry, done = (neft(*words, "-o", f"x{number}", "--json", *more).json for more in (["--dry-run"], []))
        assert dry["bytes"] == done["bytes"] == size_of(models / f"x{number}"), words
        assert neft("inspect", f"x{number}", "--json").json["bytes"] == done["bytes"]


def test_a_dry_run_of_an_adapter_says_the_bytes_that_are_then_written(models: Path, neft: Any) -> None:
    assert neft("extract", "base", "one", "-o", "r", "--neurons", "40", "--reversible").code == 0
    for number, more in enumerate(([], ["--rank", "64"])):
        words = ("export", "r", "--to", "lora", "-o", f"lora{number}", "--json", *more)
        dry, done = neft(*words, "--dry-run").json, neft(*words).json
        assert (
            dry["bytes"] == done["bytes"] == size_of(models / f"lora{number}" / "adapter_model.safetensors")
        )


def test_a_dry_run_of_apply_says_the_bytes_of_the_new_checkpoint(
    patches: tuple[Path, Path], models: Path, neft: Any
) -> None:
    shards = (models / "base").glob("*.safetensors")
    write_file(models / "file.safetensors", {k: v for shard in shards for k, v in load_file(shard).items()})
    for base in ("base", "file.safetensors"):
        dry, done = (neft("apply", base, "p", "-o", f"out-{base}", "--json", *more).json
                     for more in (["--dry-run"], []))  # fmt: skip
        assert dry["bytes"] == done["bytes"] == size_of(models / f"out-{base}")
    assert neft("apply", "out-base", "p", "--in-place", "--json").json["bytes"] is None
    told = neft("revert", "out-base", "p", "--base", "base", "-o", "back", "--json").json
    assert (
        told["bytes"]
        == size_of(models / "back")
        == size_of(models / "base") - size_of(models / "base" / "old.bin")
    )


def test_a_journal_of_patches_that_overlap_counts_a_neuron_once(
    patches: tuple[Path, Path], models: Path, neft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neftsurgery.surgery import rewrite

    def fail(*ignored: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rewrite, "_write_rows", fail)
    monkeypatch.setattr(rewrite, "heal_recorded", fail)
    assert neft("apply", "base", "p", "p", "--in-place").code == 130
    expected = len(neurons_of(models / "p", weights_only=False))
    told = neft("heal", "base", "--dry-run", "--json").json
    assert (told["neurons"], told["selected"]) == (expected, expected)
    (journal,) = told["journals"]
    assert journal["bytes"] == neft("inspect", "p", "--json").json["parameters"] * 2
    assert f"would write {expected} neurons (" in neft("heal", "base", "--dry-run").out
    assert f"{expected} neurons written back" in neft("heal", "base", "--yes").out


def test_what_selections_and_scores_say_of_themselves(models: Path, neft: Any) -> None:
    scored = neft("diff", "base", "one", "-o", "s", "--json").json
    with safe_open(models / "s", "numpy") as file:
        total = len(file.get_tensor("score"))
    assert scored["neurons"] == total
    told = neft("select", "s", "--neurons", "10%", "--with-bias", "-o", "sel", "--json").json
    counts = {name.removesuffix(":index"): len(array) for name, array in load_file(models / "sel").items()}
    parameters = sum(
        count * (SHAPES[name.removesuffix(".weight")][1] if name.endswith(".weight") else 1)
        for name, count in counts.items()
    )
    assert told["tensors"] == counts
    assert told["selected"] == sum(count for name, count in counts.items() if name.endswith(".weight"))
    assert told["selected"] == round(total / 10)
    assert told["selected_parameters"] == parameters
    shown = neft("inspect", "sel", "--json").json
    assert (shown["neurons"], shown["parameters"]) == (told["selected"], parameters)
    cut = neft("extract", "base", "one", "--selection", "sel", "-o", "x", "--json").json
    assert (cut["selected"], cut["selected_parameters"], cut["tensors"]) == (
        told["selected"],
        parameters,
        counts,
    )
