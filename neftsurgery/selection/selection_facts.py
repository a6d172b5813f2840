"""How the neurons of a selection or a patch were chosen, as their files record it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from ..checkpoint.provenance import Provenance
from ..tensors.document import Facts

__all__ = ["SelectionFacts"]


class SelectionFacts(Facts):
    """The facts of a selection file, and the ``selection`` of a patch's manifest.

    Besides what the properties read there may be ``seed``, ``merged`` and anything that others have written.
    """

    @property
    def score(self) -> str | None:
        """The score they were chosen by."""
        return self.text("score")

    @property
    def anatomy(self) -> str | None:
        """What counts as a neuron: ``rows``, ``ffn`` or ``units``."""
        return self.text("anatomy")

    @property
    def policy(self) -> str | None:
        """Which neurons come first: ``sensitive``, ``reversed`` or ``random``."""
        return self.text("policy")

    @property
    def budget(self) -> Mapping[str, object]:
        """The options that say how many, as `Budget.describe` writes them."""
        return Facts.from_json(self.get("budget"))

    @property
    def captured(self) -> float | None:
        """The share of the squared change of all common tensors that they hold."""
        return self.number("captured")

    @property
    def captured_scored(self) -> float | None:
        """The share of the squared change of the scored tensors that they hold."""
        return self.number("captured_scored")

    @property
    def companion_biases(self) -> frozenset[str]:
        """The tensors (biases) whose elements only go with the neurons of others; ``followers`` in files."""
        found = self.get("followers")
        names = found if isinstance(found, list) else []
        return frozenset(name for name in names if isinstance(name, str))

    @property
    def base(self) -> Provenance:
        """The base they were chosen on."""
        return Provenance.from_json(self.get("base"))

    @property
    def tuned(self) -> Provenance:
        """The fine-tuned checkpoint they were chosen by."""
        return Provenance.from_json(self.get("tuned"))

    def for_patch(self, *, captured: bool) -> Self:
        """What a patch records of them: its own manifest names the base.

        ``captured``: whether it has the values of ``tuned``, so that the captured shares hold for it too.
        """
        left_out = {"base", "tuned", *(key for key in self if key.startswith("captured") and not captured)}
        return type(self)({key: value for key, value in self.items() if key not in left_out})
