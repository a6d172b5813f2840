"""Switching to a patch that was attached before: nothing is read, and what changed meanwhile is noticed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attach_support import PICKS, ModelOnDisk
from safetensors.torch import load_file
from tuning_support import bits

import neftsurgery as ns

UP = "model.layers.0.mlp.up_proj"
ROWS = {
    "one": PICKS,
    "two": {f"{UP}.weight": ([0], [5, *range(8, 22)])},
    "more": {"lm_head.weight": ([0], [0])},
    "same": {f"{UP}.weight": ([0], [9, 10])},
}


class Switched:
    """A model to which the patches one and two were attached, in turns; one is attached now."""

    def __init__(self, disk: ModelOnDisk) -> None:
        self.model = copy.deepcopy(disk.model)
        self.patches = {name: ns.Patch.load(disk.root / name) for name in ROWS}
        self.attached = ns.attach(self.model, self.patches["one"])
        for name in ("two", "one"):
            self.attached.switch(self.patches[name])

    @property
    def up(self) -> Any:
        return self.model.get_submodule(UP)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> ModelOnDisk:
    found = ModelOnDisk(tmp_path_factory.mktemp("base"), torch.bfloat16)
    for name, picks in ROWS.items():
        found.patch(name, picks, 1).close()
    return found


@pytest.fixture
def switched(disk: ModelOnDisk) -> Switched:
    return Switched(disk)


def expected(disk: ModelOnDisk, name: str) -> dict[str, torch.Tensor]:
    """The tensors of the patched files."""
    ns.apply(disk.folder, disk.root / name, out=disk.root / "patched", force=True)
    return load_file(disk.root / "patched" / "model.safetensors")


def assert_holds(model: Any, files: dict[str, torch.Tensor]) -> None:
    for name, values in files.items():
        assert torch.equal(model.state_dict()[name], values), name


def test_the_file_is_not_read_again(disk: ModelOnDisk, switched: Switched) -> None:
    files = {name: expected(disk, name) for name in ("one", "two")}
    for patch in switched.patches.values():
        patch.close()
    for name in ("two", "one", "one", "two"):
        switched.attached.switch(switched.patches[name])
        assert_holds(switched.model, files[name])
        with switched.attached.disabled():
            assert bits(switched.model.state_dict()) == disk.before
    switched.attached.detach()
    assert bits(switched.model.state_dict()) == disk.before


def _one_element(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight[9, 0].add_(1)


def _its_neighbour(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight[10, 0].add_(1)


def _unseen(weight: torch.nn.Parameter) -> None:
    weight.data.add_(1)  # as PEFT merges a LoRA; torch does not count it


def _new_values(weight: torch.nn.Parameter) -> None:
    weight.data = weight.data + 1


@pytest.mark.parametrize("change", [_one_element, _its_neighbour, _unseen, _new_values])
@pytest.mark.parametrize("switches", [0, 1])
def test_a_weight_that_was_changed(switched: Switched, change: Callable[..., None], switches: int) -> None:
    """Also where another patch was attached since."""
    change(switched.up.weight)
    for _ in range(switches):
        switched.attached.switch(switched.patches["more"])
    current = switched.attached.selection
    with pytest.raises(ns.MismatchError, match="another base") as raised:
        switched.attached.switch(switched.patches["two"])
    assert raised.value.tensor == f"{UP}.weight"
    assert switched.attached.selection.tensors.keys() == current.tensors.keys()


def test_a_module_that_was_replaced(disk: ModelOnDisk, switched: Switched) -> None:
    switched.attached.switch(switched.patches["more"])
    switched.model.model.layers[0].mlp.up_proj = copy.deepcopy(switched.up)
    switched.attached.switch(switched.patches["two"])
    assert_holds(switched.model, expected(disk, "two"))


def test_a_model_that_was_cast(disk: ModelOnDisk, switched: Switched) -> None:
    switched.attached.switch(switched.patches["more"])
    switched.model.float()
    switched.attached.switch(switched.patches["two"])
    assert_holds(switched.model, {name: values.float() for name, values in expected(disk, "two").items()})


def test_neurons_that_were_attached_meanwhile(switched: Switched) -> None:
    switched.attached.switch(switched.patches["more"])
    other = ns.attach(switched.model, switched.patches["same"], mode="overlay")
    with pytest.raises(ns.UsageError, match="2 of these neurons are attached already"):
        switched.attached.switch(switched.patches["two"])
    other.detach()
    switched.attached.switch(switched.patches["two"])


def test_a_patch_that_nobody_holds_is_let_go(switched: Switched) -> None:
    held = weakref.ref(switched.patches.pop("two"))
    gc.collect()
    assert held() is None
    switched.attached.switch(switched.patches["more"])
