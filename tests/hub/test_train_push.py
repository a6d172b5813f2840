"""A recipe that publishes its patch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from hub_support import Hub
from recipes_support import make
from support import Result


def test_a_recipe_pushes_its_patch(hub: Hub, on_hub: Callable[..., Result], tmp_path: Path) -> None:
    make(tmp_path / "base", 1)
    (tmp_path / "data.jsonl").write_text('{"prompt": "shout bird:", "completion": " BIRD"}\n' * 8)
    recipe = {
        "model": "base", "out": "run", "data": {"train": "data.jsonl", "eval_share": 0.5},
        "probe": {"steps": 1}, "select": {"neurons": 9}, "train": {"steps": 1}, "push": "me/shouter",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = on_hub("train", "recipe.yaml", "--json")
    assert result.code == 0, result.err
    assert result.json["pushed"] == f"{hub.address}/me/shouter"
    patch = (tmp_path / "run" / "neuron_patch.safetensors").read_bytes()
    assert hub.read("me/shouter", "neuron_patch.safetensors") == patch
    assert "Loss on held-out examples: **" in hub.read("me/shouter", "README.md").decode()
