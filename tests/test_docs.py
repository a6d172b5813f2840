"""The documentation agrees with the code."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from pages_support import shape_of
from support import LLAMA_CONFIG, snapshot, write_folder

from neftsurgery.neurons.families import SHARED, architectures
from neftsurgery.tensors.reader import TensorFile

ROOT = Path(__file__).resolve().parents[1]


def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch, llama_arrays):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    base = llama_arrays()
    noise = np.random.default_rng(0)
    tuned = {
        name: (array + 1e-2 * noise.standard_normal(array.shape)).astype(np.float32)
        for name, array in base.items()
    }
    write_folder(tmp_path / "base", base, 2, LLAMA_CONFIG)
    write_folder(tmp_path / "tuned", tuned, 3, LLAMA_CONFIG)
    monkeypatch.chdir(tmp_path)
    exec(code[0], {})
    for file in (tmp_path / "base").iterdir():
        assert (tmp_path / "restored" / file.name).read_bytes() == file.read_bytes()


@pytest.fixture
def run_of_a_model(tmp_path, llama_arrays):
    """``base``, ``tuned`` and ``step-13`` to ``step-15``: each follows from the one before."""
    arrays, rng = llama_arrays(), np.random.default_rng(0)
    for name in ("base", "tuned", "step-13", "step-14", "step-15"):
        folder = write_folder(tmp_path / name, arrays, 1, LLAMA_CONFIG)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_text("{}")
        arrays = {key: (a + 1e-3 * rng.standard_normal(a.shape)).astype("f4") for key, a in arrays.items()}
    (tmp_path / "tuned" / "modeling_mine.py").write_text("")
    return tmp_path


def shapes(text):
    return [shape_of(line) for line in text.splitlines()]


def test_the_commands_of_the_lossless_page_say_what_it_shows(neft, run_of_a_model):
    page = (ROOT / "docs" / "lossless.md").read_text()
    ran = 0
    for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = step.partition("\n")
            words = shlex.split(command)
            if words[0] == "mkdir":
                (run_of_a_model / words[1]).mkdir()
            if words[0] == "mv":
                (run_of_a_model / words[1]).rename(run_of_a_model / words[2])
            on_hub = any(word.startswith("me/") for word in words)
            if words[0] != "neftsurgery" or on_hub:
                continue
            result = neft(*words[1:])
            assert (result.code == 0) != shown.startswith("neftsurgery: "), result
            if words[1] != "inspect":
                assert set(shapes(shown)) <= set(shapes(result.out + result.err)), (command, result)
            ran += 1
    assert ran >= 15
    assert snapshot(run_of_a_model / "step-14-at-once") == snapshot(run_of_a_model / "step-14")
    assert snapshot(run_of_a_model / "restored") == snapshot(run_of_a_model / "base")
    assert snapshot(run_of_a_model / "step-14-again") == snapshot(run_of_a_model / "step-14")


def test_the_loop_of_the_lossless_page_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "lossless.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec("".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})
    shown = "".join(re.findall(r"```\n((?:step|tensor).*?)```", page, re.DOTALL))
    assert shapes(capsys.readouterr().out) == shapes(shown)


def test_the_architectures_page_lists_every_model_type():
    page = (ROOT / "docs" / "architectures.md").read_text()
    known = architectures().rows.keys() - {SHARED}
    assert f"The table knows {len(known)} model types" in page
    listed = page.partition("The table knows ")[2].partition("<!-- end -->")[0]
    assert set(re.findall(r"`([^`\n]+)`", listed)) == known


def test_the_format_page_names_every_entry_of_a_patch(tmp_path, llama_arrays):
    import neftsurgery as ns

    page = (ROOT / "docs" / "patch-format.md").read_text()
    write_folder(tmp_path / "base", llama_arrays(), 1, LLAMA_CONFIG)
    write_folder(tmp_path / "tuned", llama_arrays(seed=1), 1, LLAMA_CONFIG)
    patch = ns.extract(
        tmp_path / "base", tmp_path / "tuned", neurons=3, reversible=True, out=tmp_path / "patch.safetensors"
    )
    with TensorFile.open(tmp_path / "patch.safetensors") as file:
        entries = {re.sub(":.*", ":DTYPE", name) for name in file.tensors}
    assert entries == {"index", "base_digest", "value:DTYPE", "base:DTYPE"}
    assert all(f"\n| `{entry}` |" in page for entry in entries)
    described = next(iter(patch.manifest["tensors"].values()))
    for key in [*patch.manifest, *patch.facts, *patch.base, *described]:
        assert f"`{key}`" in page, key


def test_the_format_page_names_every_entry_of_a_scores_file(tmp_path, llama_arrays):
    import neftsurgery as ns

    page = (
        (ROOT / "docs" / "patch-format.md")
        .read_text()
        .partition("## Scores")[2]
        .partition("## Selections")[0]
    )
    write_folder(tmp_path / "base", llama_arrays(), 1, LLAMA_CONFIG)
    write_folder(tmp_path / "tuned", llama_arrays(seed=1), 1, LLAMA_CONFIG)
    options = {"anatomy": "units", "score": "random"}
    ns.diff(tmp_path / "base", tmp_path / "tuned", out=tmp_path / "scores", **options).close()
    with TensorFile.open(tmp_path / "scores") as file:
        told = json.loads(file.header.metadata["neuron_scores"])
        names = [*file.tensors, *told, *told["descriptions"][0], *next(iter(told["unscored"].values()))]
    assert len(file.tensors) == 6
    for name in names:
        assert f"`{name}`" in page, name


def test_the_tests_that_prove_a_promise_are_there():
    page = (ROOT / "docs" / "guarantees.md").read_text().partition("## Not promised")[0]
    promises = re.findall(r"^\*\*.+?(?=^\*\*|\Z)", page, re.DOTALL | re.MULTILINE)
    assert len(promises) > 8
    for promise in promises:
        named = re.findall(r"`(tests/[^`]+\.py)`", promise.partition("*Proved by*")[2])
        assert named, promise
        for file in named:
            assert "def test_" in (ROOT / file).read_text(), file


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_glossary_is_alphabetical_and_defines_a_word_once():
    rows = (ROOT / "docs" / "glossary.md").read_text().partition("|---|---|---|\n")[2].splitlines()
    words = [row.split("|")[1].strip().lower().replace("_", " ") for row in rows]
    assert len(words) > 40
    assert words == sorted(set(words))
