"""The figure of a card: a map of the neurons that the patch replaces."""

from __future__ import annotations

from importlib.util import find_spec

from ..patch.patch import Patch
from ..reporting.layer_map import LayerMap

__all__ = ["card_figure"]


def card_figure(patch: Patch) -> bytes | None:
    """The figure as PNG; None if matplotlib is not installed or there is nothing to draw."""
    found = LayerMap.of_patch(patch)
    if find_spec("matplotlib") is None or not found.neurons:
        return None
    from ..reporting.layer_map import layer_map_figure

    return layer_map_figure(found, word="replaced", of_patch=True).png()
