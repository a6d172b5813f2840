"""Recipes and their YAML: what they may say, and the errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes_support import RECIPES

import neftsurgery as ns
from neftsurgery.training.recipe import Recipe, known_keys
from neftsurgery.training.recipe_reader import parse_overrides, read_recipe

LEAST = "model: m\nout: o\ndata: {train: d.jsonl}\nselect: {neurons: 3%}\n"


def read(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text)
    return read_recipe(tmp_path / "recipe.yaml", parse_overrides(overrides))


def test_the_least_recipe(tmp_path: Path) -> None:
    recipe = read(tmp_path, LEAST)
    assert recipe.model == str(tmp_path / "m")
    assert recipe.out == str(tmp_path / "o")
    assert recipe.data.train == str(tmp_path / "d.jsonl")
    assert (recipe.probe.by, recipe.train.learning_rate, recipe.train.more) == ("gradients", 2e-5, {})
    assert recipe.select.budget == {"neurons": "3%", "seed": 0}


def test_values_and_overrides(tmp_path: Path) -> None:
    recipe = read(
        tmp_path, LEAST + "train: {learning_rate: 2e-4, epochs: 2}\nprobe:\n",
        "model=org/name", "train.steps=7", "select.neurons=50_000", "select.include=[a*, b]",
        "train.more={optim: sgd}",         "data.train=here.jsonl", "data.eval=",
    )  # fmt: skip
    assert (recipe.model, recipe.data.train, recipe.data.eval) == ("org/name", "here.jsonl", None)
    assert (recipe.train.learning_rate, recipe.train.epochs, recipe.train.steps) == (2e-4, 2.0, 7)
    assert (recipe.select.neurons, recipe.select.include) == ("50000", ["a*", "b"])
    assert recipe.train.more == {"optim": "sgd"}


def test_a_local_path_beats_the_hub(tmp_path: Path) -> None:
    text = LEAST.replace("model: m", "model: org/name")
    assert read(tmp_path, text).model == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert read(tmp_path, text).model == str(tmp_path / "org" / "name")


@pytest.mark.parametrize(
    ("text", "overrides", "why"),
    [
        (LEAST + "modle: x", [], "a recipe has no key 'modle'.*\n?.*did you mean model"),
        (LEAST + "train: {learningrate: 1}", [], "did you mean train.learning_rate"),
        (
            LEAST + "train: {lr: 1}",
            [],
            "no key 'train.lr'\ndid you mean .* or train.learning_rate",
        ),
        (LEAST + "trian: {steps: 1}", [], "no key 'trian'\ndid you mean train"),
        (LEAST, ["learning_rate=1"], "did you mean probe.learning_rate or train.learning_rate"),
        (LEAST, ["train.step=1"], "did you mean train.steps"),
        (LEAST, ["train.steps"], "key=value"),
        (LEAST, ["train.steps=[1"], "not valid YAML"),
        (LEAST, ["train.steps=many"], "train.steps does not fit .expected a whole number, found 'many'"),
        (LEAST, ["train.steps=0"], "too small"),
        (LEAST, ["train.steps=true"], "does not fit"),
        (LEAST, ["train.learning_rate=nan"], "expected a number"),
        (LEAST, ["train.dtype=float"], "it is one of auto, float32, bfloat16, float16"),
        (LEAST, ["train.schedule=linear"], "did you mean train.scheduler"),
        (LEAST, ["train.early_stopping=2", "data.eval_share=0"], "needs a dev loss"),
        (LEAST, ["select.neurons=0.03"], "write 3%"),
        (LEAST, ["select.neurons="], "how many neurons"),
        (LEAST, ["select.params=1%"], "do not go together"),
        (LEAST, ["select.per=tensor"], "select.per: tensor does not go with select.anatomy: units"),
        (LEAST, ["select.score=l2"], "select.score does not go with probe.by gradients"),
        (LEAST, ["probe.by=tuned"], "needs probe.path"),
        (LEAST, ["probe.by=weights"], "of the base alone\none of magnitude, lowrank, norm"),
        (LEAST, ["probe.by=gradient_over_weight", "select.rank=2"], "select.rank does not go with probe.by"),
        (LEAST, ["schedule.backward=1.5"], "schedule.backward is too large"),
        (
            LEAST.replace("select", "probe: {by: scores, path: x}\nselect"),
            ["schedule.backward=0.5"],
            "does not go with probe.by scores",
        ),
        (LEAST, ["select.allocate=equal"], "select.allocate: equal does not go with select.per: model"),
        (LEAST, ["probe.path=x"], "does not go"),
        (LEAST, ["probe.strip_prefix=model"], "need probe.by: tuned"),
        (LEAST, ["probe.by=scores", "probe.path=x", "probe.add_prefix=model"], "need probe.by: tuned"),
        (LEAST, ["probe.by=selection", "probe.path=x"], "select.neurons does not go with probe.by selection"),
        (LEAST, ["data.train={a: 0}"], "weights above 0"),
        (LEAST, ["data.train={a: x}"], "weights above 0"),
        (LEAST, ["data.train=[]"], "data.train needs a set"),
        (LEAST, ["data.train=[1]"], "data.train does not fit"),
        (LEAST, ["data.eval_share=1"], "nothing to train on"),
        (LEAST.replace("model: m\n", ""), [], "does not say model"),
        (LEAST.replace("data: {train: d.jsonl}\n", ""), [], "does not say data.train"),
        (LEAST + "out: again\n", [], "'out' is given twice"),
        (LEAST + "train: 5\n", [], "a section with keys of its own"),
        ("{" + ", ".join(f"k{n}: 1" for n in range(9_000)) + ", k7: 2}", [], "'k7' is given twice"),
        ("- a\n- b\n", [], "a mapping"),
        ("a: [\n", [], "not valid YAML in line"),
        (LEAST + "train: !!timestamp x\n", [], "a value does not match its tag"),
        (LEAST + "train: !!bool x\n", [], "a value does not match its tag"),
        (LEAST + "train: !!python/object/apply:os.system [id]\n", [], "not valid YAML"),
        (LEAST + "train: &a [*a]\n", [], "have no anchors"),
        (LEAST + "train: " + "[" * 50_000 + "\n", [], "nested too deeply"),
        (LEAST + "- " * 5_000 + "\n", [], "not valid YAML"),
        (LEAST + "x" * 900 + ": 1\n", [], "a recipe has no key 'x{98}…"),
        (LEAST + "#" * 200_000, [], "larger than 100,000 bytes"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, overrides: list[str], why: str) -> None:
    with pytest.raises(ns.UsageError, match=why):
        read(tmp_path, text, *overrides)


def test_a_mapping_is_a_recipe_too(tmp_path: Path) -> None:
    """Paths in a mapping start from the current folder; overrides come by section or by dotted key."""
    recipe = {"model": Path("m"), "out": "o", "data": {"train": "d.jsonl"}, "select": {"neurons": 50}}
    made = read_recipe(recipe, {"train": {"steps": 7}, "select.include": ("a*", "b"), "out": Path("p")})
    assert (made.model, made.out, made.data.train) == ("m", "p", "d.jsonl")
    assert (made.train.steps, made.select.include, made.select.neurons) == (7, ["a*", "b"], "50")
    assert read_recipe(recipe, {"data": None}).data.train == "d.jsonl"
    for overrides, why in (
        ({"lr": 1}, "a recipe has no key 'lr'"),
        ({"train": 5}, "a section with keys of its own"),
        ({"train.more": {"optim": object()}}, "expected a mapping of plain values"),
        ({"train.epochs": 10**400}, "train.epochs does not fit"),
    ):
        with pytest.raises(ns.UsageError, match=why) as caught:
            read_recipe(recipe, overrides)
        assert caught.value.file is None
    with pytest.raises(ns.UsageError, match="does not say out"):
        read_recipe({"model": "m"})


def test_a_recipe_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(LEAST.encode() + b"\xd8\n")
    with pytest.raises(ns.UsageError, match="not UTF-8"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ns.UsageError, match="no such recipe"):
        read_recipe(tmp_path / "no.yaml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")))
def test_the_recipes_here_can_be_read(path: Any) -> None:
    assert Path(read_recipe(path).data.train).exists()


def test_the_recipe_of_the_documentation_can_be_read(tmp_path: Path) -> None:
    page = (RECIPES.parent / "docs" / "training.md").read_text()
    text, *sections = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert read(tmp_path, text).train.epochs == 3
    for section in sections:  # in place of the recipe's own
        read(tmp_path, yaml.safe_dump({**yaml.safe_load(text), **yaml.safe_load(section)}))


def test_the_quickstart_names_every_key_that_matters() -> None:
    text = (RECIPES / "quickstart.yaml").read_text()
    rare = {
        "data.subset",
        "data.split",
        "data.eval_split",
        "data.limit",
        "probe.learning_rate",
        "train.clip",
        "train.mode",
    }
    for key in known_keys():
        section, _, name = key.rpartition(".")
        assert section == "select" or key in rare or f"{name}:" in text or f"`{name}`" in text, key


def test_all_errors_are_raised_at_once(tmp_path: Path) -> None:
    """One for each fault, in the file's words; a check of two keys waits until both are right."""
    text = "model: m\nmodle: n\ndata: {eval_share: 2, prompt: '{q}'}\nselect: {neurons: 3%}\ntrain: 5\n"
    with pytest.raises(ns.UsageError) as caught:
        read(tmp_path, text, "probe.by=tuned", "train.more={}", "train.steps=-1", "train.more.optim=sgd")
    file = tmp_path / "recipe.yaml"
    assert re.findall(r"^(\S+): (.*)", str(caught.value), re.MULTILINE) == [
        (str(file), "a recipe has no key 'modle'"),
        (str(file), "train is a section with keys of its own, not a value"),
        (str(file), "the recipe does not say out"),
        (str(file), "the recipe does not say data.train"),
        (str(file), "train.steps is too small (found -1)"),
        (str(file), "probe.by tuned needs probe.path"),
    ]
    with pytest.raises(ns.UsageError, match="k9'") as caught:
        read(tmp_path, "{" + ", ".join(f"k{n}: 1" for n in range(5_000)) + "}")
    assert "k10'" not in str(caught.value)  # ten are enough


def test_more_is_reached_key_by_key(tmp_path: Path) -> None:
    more = read(
        tmp_path, LEAST + "train: {more: {a: 1, b: 2}}", "train.more.b=3", "train.more.c=x"
    ).train.more
    assert more == {"a": 1, "b": 3, "c": "x"}
    with pytest.raises(ns.UsageError, match=r"train\.more does not fit"):
        read(tmp_path, LEAST, "train.more=5", "train.more.b=3")


def test_several_sets_start_from_the_recipe_too(tmp_path: Path) -> None:
    for given, expected in (
        ("[a.jsonl, org/b]", [str(tmp_path / "a.jsonl"), "org/b"]),
        ("{a.jsonl: 3, org/b: 0.5}", {str(tmp_path / "a.jsonl"): 3, "org/b": 0.5}),
    ):
        recipe = read(tmp_path, LEAST.replace("d.jsonl", given))
        assert recipe.data.train == expected
        assert recipe.data.names == list(expected)
        assert read_recipe(recipe.to_json()) == recipe
