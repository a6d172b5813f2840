"""`neftsurgery report --utilization`: the section, its figures and its numbers, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_support import tokenizer
from support import snapshot
from transformers import LlamaConfig, LlamaForCausalLM

import neftsurgery as ns
from neftsurgery.neuron_utilization.result import GROUPS, Utilization

HOW = ("--utilization", "--base", "base", "--text", "text.txt")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    words = tokenizer()
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), initializer_range=0.3, **sizes))
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    ns.extract(folder / "base", folder / "tuned", anatomy="ffn", neurons=12, out=folder / "patch.safetensors")
    ns.diff(folder / "base", folder / "tuned", out=folder / "scores.safetensors")
    (folder / "text.txt").write_text("a cat\nsome dogs\n")
    return folder


@pytest.fixture
def here(neft: Any, made: Path, tmp_path: Path) -> Path:
    """The files, in the folder that commands are run in."""
    for one in made.iterdir():
        (tmp_path / one.name).symlink_to(one)
    return tmp_path


def test_the_page_has_the_section_and_its_numbers_are_those_of_python(neft: Any, here: Path) -> None:
    result = neft(
        "report", "patch.safetensors", "-o", "page.html", "--figures", "figures", *HOW, "--strongly", "20%",
        "--neurons-out", "use.safetensors", "--json",
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    found = ns.utilization(here / "base", here / "patch.safetensors", here / "text.txt", strongly="20%")
    (section,) = [one for one in result.json["sections"] if one["kind"] == "utilization"]
    described = json.loads(json.dumps(found.describe()))
    assert {key: section[key] for key in described} == described
    assert section["figures"] == ["use-groups", "use-buckets", "use-map"]
    figures = result.json["figures"]
    rows = {(row["kind"], row["group"]): row for row in figures["use-groups"]["rows"]}
    for name, group in found.groups().items():
        assert rows["all kinds", name]["neurons"] == group.neurons
        assert rows["all kinds", name]["mean_rank_change"] == group.mean_rank_change
        for kind in found.kinds:
            assert rows[kind, name]["neurons"] == found.groups(kind=kind)[name].neurons
    assert [row["neurons"] for row in figures["use-buckets"]["rows"]] == [b.neurons for b in found.buckets()]
    cells = {(row["layer"], row["kind"]): row for row in figures["use-map"]["rows"]}
    assert len(cells) == 4
    for (layer, kind), row in cells.items():
        groups = found.groups(layer=layer, kind=kind)
        assert [row[name] for name in GROUPS] == [groups[name].neurons for name in GROUPS]
        assert row["mean_share"] == groups["all"].mean_share
    saved = Utilization.load(here / "use.safetensors")
    assert saved.describe()["groups"] == described["groups"]
    page = (here / "page.html").read_text()
    for id in section["figures"]:
        assert f'<figure id="{id}">' in page
        assert (here / "figures" / f"{id}.png").read_bytes().startswith(b"\x89PNG")
        with open(here / "figures" / f"{id}.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == len(figures[id]["rows"])
    assert "Trained neurons moved by" in page
    assert not re.search(r"(src|href)=\"https?:", page)


def test_a_checkpoint_and_patches_beside_scores(neft: Any, here: Path) -> None:
    """Each patch and checkpoint has a section of its own; a checkpoint has that alone; scores have none."""
    result = neft(
        "report", "scores.safetensors", "patch.safetensors", "tuned", *HOW, "--states", "following", "--json"
    )
    kinds = [section["kind"] for section in result.json["sections"]]
    assert kinds == ["scores", "patch", "overlap", "utilization", "utilization"]
    patch, tuned = result.json["sections"][3:]
    assert (patch["id"], tuned["id"]) == ("utilization-1", "utilization-2")
    assert patch["states"] == tuned["states"] == "following"
    assert patch["groups"]["trained"]["neurons"] == 12
    assert tuned["groups"]["trained"]["neurons"] == 96  # a full fine-tune: every up row and down column
    assert tuned["tuned"]["name"] == "tuned"
    alone = neft("report", "tuned", *HOW, "-o", "page.html")
    assert alone.code == 0
    assert "tuned: 96 neurons to rank" in alone.out
    assert "<title>Use of neurons: tuned</title>" in (here / "page.html").read_text()


def test_a_dry_run_loads_no_weights_and_writes_nothing(
    neft: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neftsurgery.neuron_utilization import measure

    monkeypatch.setattr(measure, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    before = snapshot(here)
    result = neft("report", "patch.safetensors", "-o", "page.html", *HOW, "--dry-run")
    assert result.code == 0
    assert "96 neurons to rank, before and after, on 14 tokens of 2 texts" in result.out
    assert "would write the page to page.html" in result.out
    (told,) = neft("report", "patch.safetensors", *HOW, "--dry-run", "--json").json["utilization"]
    assert told["text"]["tokens"] == 14
    assert snapshot(here) == before


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("patch.safetensors", "--utilization", "--text", "text.txt"), 2, "--utilization needs --base"),
        (("patch.safetensors", "--utilization", "--base", "base"), 2, "--utilization needs --text"),
        (("patch.safetensors", "--text", "text.txt"), 2, "--text needs --utilization"),
        (("scores.safetensors", *HOW), 2, "--utilization needs a patch of chosen neurons, or a checkpoint"),
        (("patch.safetensors", "tuned", *HOW, "--neurons-out", "x"), 2, "--neurons-out needs exactly one"),
        (("patch.safetensors", *HOW, "--neurons-out", "text.txt"), 2, "text.txt: "),
        (("patch.safetensors", *HOW, "--strongly", "0.5"), 2, "neither a percentage nor a whole number"),
        (("patch.safetensors", *HOW[:2], "tuned", *HOW[3:]), 3, "the patch is not of this base"),
        (("patch.safetensors", "--utilization", "--base", "base", "--text", "none"), 2, "no such text file"),
        (("nothing/at/all", *HOW), 2, "nothing/at/all"),
    ],
)  # fmt: skip
def test_what_is_refused(neft: Any, here: Path, words: tuple[str, ...], code: int, text: str) -> None:
    before = snapshot(here)
    result = neft("report", *words, "-o", "page.html")
    assert result.code == code
    assert text in result.err
    assert "Traceback" not in result.err
    assert snapshot(here) == before


def test_without_the_training_extra(here: Path) -> None:
    """The core has no torch: the option says what to install."""
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from neftsurgery.cli.main import run\n"
        f"run(['report', 'patch.safetensors', '-o', 'page.html', *{HOW!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "neftsurgery: --utilization needs torch, which is not installed\n"
        "in a clone of neftsurgery: pip install '.[train]'\n"
    )
    assert not (here / "page.html").exists()
