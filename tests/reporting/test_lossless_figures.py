"""The section of a lossless patch: what changed and what it takes, against a count by hand."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from lossless_support import folder, tensor, touched
from matplotlib.image import imread
from safetensors.numpy import load_file

import neftsurgery as ns
from neftsurgery.patch.lossless import LosslessPatch
from neftsurgery.reporting.sections import lossless_figures


@pytest.fixture
def whole(pair, tmp_path):
    """The lossless patch of ``pair``."""
    ns.extract(*pair, lossless=True, out=tmp_path / "whole.safetensors").close()
    return tmp_path / "whole.safetensors"


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_what_changed_by_layer_and_kind(neft, pair, whole):
    result = neft("report", whole, "--json", "-o", "page.html", "--figures", "figures")
    assert result.code == 0, result.err
    figures = result.json["figures"]
    base, tuned = map(arrays, pair)
    changed = {name: int((base[name].view("u4") != tuned[name].view("u4")).sum()) for name in base}
    rows = figures["changed"]["rows"]
    assert len(rows) == len(base)
    for row in rows:
        name = f"{row['layer']}.{row['kind']}.weight".removeprefix(".")
        assert (row["changed"], row["elements"]) == (changed[name], base[name].size)
        assert row["share"] == pytest.approx(changed[name] / base[name].size)
    (section,) = result.json["sections"]
    assert section["kind"] == "lossless"
    assert section["bytes"] == whole.stat().st_size
    stored = figures["stored"]["rows"]
    assert sum(row["tuned_bytes"] for row in stored) == sum(array.nbytes for array in tuned.values())
    assert sum(row["code"] for row in stored) == sum(one["code"] for one in section["forms"].values())
    kinds = {row["kind"]: row for row in figures["forms"]["rows"]}
    assert kinds["mlp.up_proj"]["changed"] == sum(n for name, n in changed.items() if "up_proj" in name)
    assert kinds["input_layernorm"]["stored_as"] == "same 100%"
    assert (whole.parent / "page.html").read_text().count("<figure") == 3
    assert {path.name for path in (whole.parent / "figures").iterdir()} == {
        "changed.png", "changed.svg", "changed.csv", "stored.png", "stored.svg", "stored.csv", "forms.csv",
    }  # fmt: skip


def test_beside_scores_and_a_neuron_patch(neft, files, whole):
    result = neft("report", "scores.safetensors", whole, "patch.safetensors", "--json", "-o", "page.html")
    assert result.code == 0, result.err
    kinds = [section["kind"] for section in result.json["sections"]]
    assert kinds == ["scores", "lossless", "patch", "overlap"]
    assert {"changed-2", "stored-2", "forms-2"} <= result.json["figures"].keys()
    assert len(result.json["figures"]["overlap"]["rows"]) == 1
    told = neft("report", whole, "-o", "one.html", "--neurons", "3%")
    assert "of all elements changed." in told.out
    assert "neurons" not in told.out


def test_other_commands_say_that_it_chooses_no_neurons(neft, pair, whole):
    text = whole.parent / "t.txt"
    text.write_text("a\n")
    words = ("report", whole, "-o", "r.html", "--utilization", "--base", "base", "--text", text)
    result = neft(*words)
    assert (result.code, "needs a patch of chosen neurons, or a checkpoint" in result.err) == (2, True)


def test_any_names_and_hardly_anything(tmp_path):
    rng = np.random.default_rng(0)
    names = ["<script>", "$x_{1$", "\x1b[2J", "層.0.重", "9" * 300, *(f"layers.{i}.k{i}" for i in range(200))]
    base = {name: tensor("BF16", (3, 5), rng) for name in names}
    tuned = {name: touched(one, 0.3, rng) for name, one in base.items()}
    nothing = {"e": tensor("F32", (0,), rng)}
    for sides in ((base, tuned), (nothing, nothing)):
        at = tmp_path / str(len(list(tmp_path.iterdir())))
        a, b = folder(at / "a", sides[0]), folder(at / "b", sides[1])
        ns.extract(a, b, lossless=True, out=at / "p.safetensors").close()
        made = ns.report(at / "p.safetensors", out=at / "r.html")
        for name in ("changed", "stored"):
            assert imread(io.BytesIO(made.figures[name].png())).ndim == 3
        assert "<script>" not in (at / "r.html").read_text()


def test_a_patch_without_tensors_has_tables_only():
    """Nobody makes one, but a file can claim it."""
    made = lossless_figures(cast(LosslessPatch, SimpleNamespace(weights=dict, kinds=dict)), "")
    assert [(figure.draw, figure.table.rows) for figure in made] == [(None, ())] * 3
