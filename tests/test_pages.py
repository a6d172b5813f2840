"""The commands of README and of the pages, typed as they are printed."""

from __future__ import annotations

import re
import shutil

import click
import numpy as np
import pytest
from pages_support import PAGES, ROOT, files, follow, steps
from recipes_support import RECIPES, make
from safetensors.numpy import load_file, save_file

from neftsurgery.cli.main import cli
from neftsurgery.demo.planted import make_base, make_tuned

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What ``neftsurgery demo --files-only try`` makes first: ``base`` and ``tuned``."""
    folder = tmp_path_factory.mktemp("made")
    make_tuned(folder / "tuned", make_base(folder / "base"))
    return folder


@pytest.fixture
def tried(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made, tmp_path / "try")


def is_demo(step):
    return step.words[:2] == ["neftsurgery", "demo"]


@pytest.mark.filterwarnings("ignore")
def test_the_commands_of_the_readme_print_what_it_shows(neft, tried):
    (recipe,) = files(README, "yaml")
    (tried / "recipe.yaml").write_text(recipe)
    lines = (RECIPES / "data" / "shout.jsonl").read_text().splitlines(keepends=True)
    (tried / "mine.jsonl").write_text("".join(lines[:24]))
    make(tried / "my-model", 3)
    on_hub = ("push", "me/skill")  # tests/field pushes to a Hub

    def skip(step):
        return is_demo(step) or ("--dry-run" not in step.words and any(word in on_hub for word in step.words))

    ran = follow(README, neft, skip)
    assert len(ran) == 10
    for file in (tried / "base").iterdir():
        assert (tried / "back" / file.name).read_bytes() == file.read_bytes()


def test_the_commands_of_the_page_on_neuron_patches(neft, tried, monkeypatch):
    monkeypatch.chdir(tried)
    page = (ROOT / "docs" / "neuron-patches.md").read_text()
    assert len(follow(page, neft, is_demo)) == 15
    (code,) = files(page, "python")
    exec(code, {})
    for file in (tried / "base").iterdir():
        for restored in ("back", "mine", "restored-again"):
            assert (tried / restored / file.name).read_bytes() == file.read_bytes()


def test_the_commands_of_the_page_on_mergekit(neft, pair, tmp_path):
    base, _ = pair
    rng = np.random.default_rng(0)
    for name in ("german", "french"):
        folder = shutil.copytree(base, tmp_path / name)
        for file in folder.glob("*.safetensors"):
            moved = {key: value + 1e-3 * rng.random(value.shape) for key, value in load_file(file).items()}
            save_file({key: value.astype(np.float32) for key, value in moved.items()}, file)
    page = (ROOT / "docs" / "from-mergekit.md").read_text()
    assert len(follow(page, neft, is_demo)) == 11
    for file in base.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_on_a_page_is_one(page):
    for step in steps(page.read_text()):
        if step.words[0] != "neftsurgery" or any("neftsurgery: " in line for line in step.shown[:1]):
            continue
        name, *words = step.words[1:]
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, step.printed
        try:
            command.make_context(name, words, parent=click.Context(cli))
        except click.UsageError as error:
            pytest.fail(f"{step.printed}: {error.format_message()}")


def test_the_readme_is_short_and_its_links_lead_somewhere():
    """They are whole addresses: README is also shown where the repository is not."""
    assert len(README.splitlines()) < 120
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert all(target.startswith("https://") for target in targets)
    ours = [target for target in targets if "neftsurgery" in target]
    assert len(ours) > 15
    for target in ours:
        path = re.sub(r"^https://(github|raw.githubusercontent).com/neftsurgery/neftsurgery/", "", target)
        path = re.sub(r"^((blob|tree)/)?main/", "", path)
        assert (ROOT / path).exists(), target


def test_nothing_is_installed_from_an_index_that_does_not_have_it():
    for file in [*ROOT.glob("neftsurgery/**/*.py"), *PAGES]:
        assert not re.search(r"pip install [^\n`]*\bneftsurgery\b(?!/)", file.read_text()), file
