"""The commented recipes of `train --init`: all keys, all defaults, and the recipes of recipes/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes_support import RECIPES

from neftsurgery.training.recipe import known_keys
from neftsurgery.training.recipe_reader import read_recipe
from neftsurgery.training.recipe_text import TASKS, recipe_text

LEAST = {"model": "m", "out": "o", "data": {"train": "d"}, "select": {"neurons": "3%"}}


def keys(text: str) -> list[str]:
    """The dotted keys of a commented recipe, behind a ``#`` or not, in order."""
    section, found = "", []
    for line in text.splitlines():
        if match := re.match(r"(\w+):$", line):
            section = f"{match[1]}."
        elif match := re.match(r"( {0,2})(?:# )?(\w+):", line):
            found.append((section if match[1] else "") + match[2])
    return found


@pytest.mark.parametrize("task", [None, *TASKS])
def test_every_key_is_there_once_in_order(task: str | None) -> None:
    assert keys(recipe_text(task)) == list(known_keys())


def test_what_is_commented_out_is_the_default() -> None:
    """With every ``#`` before a key removed, nothing changes but what the recipe says anyway."""
    text = recipe_text()
    said = yaml.safe_load(text)
    full = yaml.safe_load(re.sub(r"^( {0,2})# (\w+:)", r"\1\2", text, flags=re.MULTILINE))
    assert read_recipe(full) == read_recipe(said)


@pytest.mark.parametrize("task", TASKS)
def test_the_recipe_of_a_task_is_that_of_its_folder(task: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_text(task))

    def values(folder: Path) -> dict[str, Any]:
        return read_recipe(folder / "recipe.yaml", {"out": "run", "probe.steps": None}).to_json()

    assert values(tmp_path) == values(RECIPES / task)


def test_the_key_reference_is_generated() -> None:
    page = (RECIPES.parent / "docs" / "recipe.md").read_text()
    assert re.findall(r"^```yaml$\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) == [recipe_text()]


def test_train_prints_and_writes_it(neft: Any, tmp_path: Path) -> None:
    assert neft("train", "--init").out == recipe_text()
    facts = neft("train", "--init", "maths", "-o", "new.yaml", "--dry-run", "--json").json
    assert (facts["recipe"], facts["out"]) == (recipe_text("maths"), None)
    assert not (tmp_path / "new.yaml").exists()
    assert neft("train", "--init", "maths", "-o", "new.yaml").code == 0
    assert (tmp_path / "new.yaml").read_text() == recipe_text("maths")
    again = neft("train", "--init", "-o", "new.yaml")
    assert (again.code, "--force" in again.err) == (2, True)
    assert neft("train", "--init", "-o", "new.yaml", "--force").code == 0
    wrong = neft("train", "--init", "sums")
    assert (wrong.code, "tasks are" in wrong.err) == (2, True)
    assert "--init" in neft("train").err
