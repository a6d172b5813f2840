"""Every recipe, as its page says to run it in small: what stands under "In small", typed as it is."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from recipes_support import RECIPES, make

PAGES = sorted(path.parent.name for path in RECIPES.glob("*/README.md"))
_BLOCK = re.compile(r"^## In small$.*?^```console$(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of each command of a page's last section."""
    block = _BLOCK.search(page)
    assert block is not None
    lines = block[1].replace("\\\n", " ").strip().splitlines()
    assert all(line.startswith("$ ") for line in lines)
    return [shlex.split(line[2:], comments=True) for line in lines]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the folder, with the tiny model made."""
    copy = tmp_path_factory.mktemp("recipes") / "recipes"
    shutil.copytree(RECIPES, copy, ignore=shutil.ignore_patterns("tiny-model", "quickstart"))
    make(copy / "tiny-model", 20)
    return copy


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PAGES)
def test_in_small(neft: Any, recipes: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipes / name)
    for program, *rest in commands((recipes / name / "README.md").read_text()):
        if program == "neftsurgery":
            result = neft(*rest)
            assert result.code == 0, result.err
        else:
            assert program == "python"
            monkeypatch.setattr(sys, "argv", rest)
            runpy.run_path(rest[0], run_name="__main__")
    assert not {path.name for path in (recipes / name).iterdir()} <= {
        path.name for path in (RECIPES / name).iterdir()
    }


def test_every_recipe_is_in_the_table() -> None:
    table = (RECIPES / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[.*?\]\((\w+)/?\) \|", table, re.MULTILINE)) == PAGES


@pytest.mark.parametrize(
    "path", [RECIPES / "measure.py", *sorted(RECIPES.glob("*/*.py"))], ids=lambda path: path.stem
)
def test_scripts_stay_short(path: Path) -> None:
    """A recipe is read before it is copied: fifty lines of code, its documentation apart."""
    body = re.sub(r'^""".*?^"""$', "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len([line for line in body.splitlines() if line.strip()]) <= 50
