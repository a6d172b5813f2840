"""The manifest of a patch: the JSON document in its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Self

from ..checkpoint.provenance import Provenance
from ..selection.selection_facts import SelectionFacts
from ..tensors.document import Facts
from ..version import __version__

__all__ = ["PATCH_VERSION", "Manifest"]

PATCH_VERSION: Final = 1


class Manifest(Facts):
    """What a patch says of itself. `PatchWriter` adds the version and the tensors."""

    @classmethod
    def of(
        cls, base: Provenance, selection: SelectionFacts, more: Mapping[str, object] | None = None
    ) -> Self:
        """The manifest of a patch that is made now; ``more`` is JSON, such as ``training``."""
        parts = {"base": base.to_json(), "selection": selection.to_json()}
        return cls({**parts, "created_by": f"neftsurgery {__version__}", **(more or {})})

    @property
    def base(self) -> Provenance:
        """What the patch was made from."""
        return Provenance.from_json(self.get("base"))

    @property
    def selection(self) -> SelectionFacts:
        """How its neurons were chosen."""
        return SelectionFacts.from_json(self.get("selection"))

    @property
    def training(self) -> Facts:
        """How its values were trained; empty if that is not recorded."""
        return Facts.from_json(self.get("training"))

    def written(self, tensors: Mapping[str, object]) -> dict[str, object]:
        """The document of a new patch file that touches ``tensors``."""
        rest = {key: value for key, value in self.items() if key not in ("version", "tensors")}
        return {"version": PATCH_VERSION, **rest, "tensors": tensors}
