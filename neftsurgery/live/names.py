"""From the tensor names in a checkpoint's files to the parameter names of the live model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import MismatchError
from .loading_rules import LoadingRules
from .placement import same_weight

__all__ = ["live_names"]


def live_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The weight of ``model`` that each tensor of the files becomes; an error unless each has its own.

    A tensor that transformers merges, splits or transposes is an error: `live_places` knows where it lies.
    """
    rules = LoadingRules(model)
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        found[name], pattern = rules.find(name)
        if not isinstance(rules.weights[found[name]], nn.Parameter):
            raise MismatchError("a buffer of the model, which has no neurons", tensor=name)
        if pattern is not None:
            raise MismatchError(
                "transformers merges, splits or transposes this tensor when it loads the file, "
                "so the model does not have its neurons",
                tensor=name,
                found=f"loaded as {found[name]}",
                hint="choose neurons of other tensors",
            )
        if (other := taken.setdefault(found[name], name)) != name:
            raise same_weight(name, other, found[name])
    return found
