"""The stack of blocks of a transformers model, and the width of its hidden states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import MismatchError
from ..neurons.tensor_names import layer_and_kind

__all__ = ["BlockStack", "find_block_stack", "hidden_size"]


@dataclass(frozen=True)
class BlockStack:
    """The blocks that the hidden states pass through, one after the other."""

    path: str  # the name of the list of blocks in the model, ``"model.layers"``
    blocks: tuple[nn.Module, ...]  # the blocks, first to last

    def block_of(self, parameter: str) -> int | None:
        """The number of the block that contains a parameter of the live model; None if no block does."""
        parent, _, number = layer_and_kind(parameter.split("."))[0].rpartition(".")
        return int(number) if parent == self.path and number.isdecimal() else None


def find_block_stack(model: nn.Module, parameters: Iterable[str]) -> BlockStack:
    """The stack of blocks that contains ``parameters``; of several, that of the language model.

    Raises MismatchError if there is no such stack, or more than one.
    """
    paths = dict.fromkeys(layer_and_kind(name.split("."))[0].rpartition(".")[0] for name in parameters)
    modules = dict(model.named_modules())
    found = {}
    for path in paths:
        module = modules.get(path) if path else None
        if isinstance(module, nn.ModuleList):
            found[path] = BlockStack(path, tuple(module))
    if len(found) > 1:
        depth = getattr(_text_config(model), "num_hidden_layers", None)
        found = {path: stack for path, stack in found.items() if len(stack.blocks) == depth}
    if len(found) != 1:
        raise MismatchError(
            "the model must have exactly one stack of blocks with neurons as wide as the hidden states",
            expected="one stack",
            found=", ".join(found or paths) or "none",
        )
    return next(iter(found.values()))


def hidden_size(model: Any) -> int:
    """The width of a model's hidden states.

    Raises MismatchError if the model's config has no ``hidden_size``.
    """
    width = getattr(_text_config(model), "hidden_size", None)
    if not isinstance(width, int):
        raise MismatchError("the model's config has no hidden_size", found=type(model).__name__)
    return width


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()
