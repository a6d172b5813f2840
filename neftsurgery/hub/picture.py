"""The picture of a card: where a patch's neurons lie, where there is something to draw it with."""

from __future__ import annotations

from importlib.util import find_spec

from ..patch.patch import Patch
from ..reporting.layer_map import LayerMap

__all__ = ["PICTURE_NAME", "picture_of"]

PICTURE_NAME = "neurons.png"


def picture_of(patch: Patch) -> bytes | None:
    """The picture as PNG; None where matplotlib is not installed, or no neuron has a place."""
    found = LayerMap.of_patch(patch)
    if find_spec("matplotlib") is None or not found.neurons:
        return None
    from ..reporting.layer_map_figure import layer_map_figure

    return layer_map_figure(found, word="replaced", of_patch=True).png()
