"""The picture of a card: where a patch's neurons lie, where there is something to draw it with."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from ..patch.patch import Patch

__all__ = ["PICTURE_NAME", "picture_of"]

PICTURE_NAME = "neurons.png"


def picture_of(patch: Patch) -> bytes | None:
    """The picture as PNG; None where matplotlib is not installed, or there is nothing to draw with.

    A card is whole without it, so it is asked for by name: neither is loaded, or has to be there, before.
    """
    if find_spec("matplotlib") is None or find_spec("neftsurgery.report") is None:
        return None
    found = import_module("neftsurgery.report.layer_map").LayerMap.of_patch(patch)
    if not found.neurons:
        return None
    png = import_module("neftsurgery.report.map_figure").map_figure(found, word="replaced").png()
    assert isinstance(png, bytes)
    return png
