"""The recipe as a value: its scope, its budget, and the JSON that it is written as."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from neftsurgery.options import Scope
from neftsurgery.selection.budget import Budget
from neftsurgery.training.recipe import Select
from neftsurgery.training.recipe_reader import read_recipe

RECIPE = {"model": "m", "out": "o", "data": {"train": "d.jsonl"}, "select": {"neurons": "3%"}}


def test_select_has_the_keys_of_scope_and_budget_and_the_score() -> None:
    groups = [*dataclasses.fields(Scope), *dataclasses.fields(Budget)]
    names = {one.name for one in groups} | {"score", "rank"}
    assert {one.name for one in dataclasses.fields(Select)} == names


def test_scope_and_budget_are_what_was_given() -> None:
    select = Select(threshold=0.0, with_bias=True, include=["a*"], axis={"*": 0})
    assert select.budget == {"threshold": 0.0, "with_bias": True, "seed": 0}
    assert select.scope == Scope("units", {"*": 0}, ["a*"], [], [])


def test_its_json_means_the_same_in_any_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = read_recipe(RECIPE, {"data.eval": "org/name"}).to_json()
    assert written["model"] == str(tmp_path / "m")
    assert written["data"]["train"] == str(tmp_path / "d.jsonl")
    assert written["data"]["eval"] == "org/name"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_recipe(written).to_json() == written
