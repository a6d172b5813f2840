"""A model's stack of blocks, and its mean hidden states over a text, added up layer by layer as it runs.

They are numbered like ``hidden_states`` in transformers: number 0 enters the first block, number ``i`` leaves
block ``i - 1``, and the last one has passed through the final norm, if there is one. In addition to what the
model holds, only one layer's hidden states are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import MismatchError
from ..neurons.tensor_names import layer_and_kind
from .tokenized_text import TokenChunk


def mean_hidden_states(
    model: Any,
    stack: BlockStack,
    batches: Iterable[Sequence[TokenChunk]],
    *,
    padding: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """The weighted mean of the hidden states, float64 ``[blocks + 1, hidden]`` on the CPU; no head is run."""
    sums = _StateSums(stack)
    body, device = model.base_model, next(model.parameters()).device
    with sums.taken_by_hooks(), torch.inference_mode():
        for batch in batches:
            ids, mask, sums.weights = _padded(batch, padding)
            output = body(input_ids=ids.to(device), attention_mask=mask.to(device))
            sums.end(output.last_hidden_state)
            advance(sum(len(chunk.ids) for chunk in batch))
    return sums.result()


def _padded(batch: Sequence[TokenChunk], padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask int64, and weights float64, each ``[chunks, tokens of the longest chunk]``."""
    ids = [torch.tensor(chunk.ids) for chunk in batch]
    each = [torch.full((len(chunk.ids),), chunk.weight, dtype=torch.float64) for chunk in batch]
    weights = pad_sequence(each, batch_first=True)
    return pad_sequence(ids, batch_first=True, padding_value=padding), (weights > 0).long(), weights


class _StateSums:
    """The sums of the hidden states that enter and leave the blocks."""

    def __init__(self, stack: BlockStack) -> None:
        self._stack, self.weights = stack, torch.empty(0)  # weights of the tokens that go through it now
        self._sums: dict[int, Tensor] = {}
        self._seen: list[int] = []

    @contextmanager
    def taken_by_hooks(self) -> Iterator[None]:
        first, *_ = blocks = self._stack.blocks
        hooks = [first.register_forward_pre_hook(self._enters, with_kwargs=True)]
        for number, block in enumerate(blocks[:-1], 1):
            hooks.append(block.register_forward_hook(partial(self._leaves, number)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def end(self, last: Tensor) -> None:
        self._add(len(self._stack.blocks), last)
        if self._seen != list(range(len(self._stack.blocks) + 1)):
            raise MismatchError(
                f"the model must run the blocks of {self._stack.path} in order and once each",
                expected=f"{len(self._stack.blocks)} blocks",
                found=f"{len(self._seen) - 1} runs",
            )
        self._seen = []

    def result(self) -> Tensor:
        means = torch.stack([self._sums[number] for number in sorted(self._sums)])
        wrong = (~torch.isfinite(means).all(dim=1)).nonzero().flatten()
        if len(wrong):
            raise MismatchError(
                f"hidden state {int(wrong[0])} of {len(means)} is not finite",
                hint="compute in a wider dtype, such as float32",
            )
        return means

    def _enters(self, module: Any, args: Any, kwargs: Any) -> None:
        self._add(0, args[0] if args else kwargs.get("hidden_states"))

    def _leaves(self, number: int, module: Any, args: Any, output: Any) -> None:
        self._add(number, output[0] if isinstance(output, (tuple, list)) else output)

    def _add(self, number: int, states: Any) -> None:
        shape = tuple(states.shape) if isinstance(states, Tensor) else None
        if shape is None or len(shape) != 3 or shape[:2] != tuple(self.weights.shape):
            raise MismatchError(
                f"the blocks of {self._stack.path} do not pass on one hidden state per token",
                expected=[*self.weights.shape, "hidden"],
                found=type(states).__name__ if shape is None else list(shape),
            )
        self._seen.append(number)
        total = self._sums.setdefault(number, torch.zeros(shape[2], dtype=torch.float64))
        for row, weights in zip(states, self.weights, strict=True):  # one chunk at a time in float64
            count = int(torch.count_nonzero(weights))
            total += weights[:count] @ row[:count].cpu().double()


@dataclass(frozen=True)
class BlockStack:
    """The blocks that the hidden states pass through, one after the other."""

    path: str  # the name of the list of blocks in the model, ``"model.layers"``
    blocks: tuple[nn.Module, ...]  # the blocks, first to last

    def block_of(self, parameter: str) -> int | None:
        """The number of the block that contains a parameter of the live model; None if no block does."""
        parent, _, number = layer_and_kind(parameter)[0].rpartition(".")
        return int(number) if parent == self.path and number.isdecimal() else None


def find_block_stack(model: nn.Module, parameters: Iterable[str]) -> BlockStack:
    """The stack of blocks with ``parameters``, of several the language model's; else an error."""
    paths = dict.fromkeys(layer_and_kind(name)[0].rpartition(".")[0] for name in parameters)
    modules = ((path, module) for path, module in model.named_modules() if path in paths)
    found = {path: BlockStack(path, tuple(m)) for path, m in modules if isinstance(m, nn.ModuleList)}
    if len(found) > 1:
        depth = getattr(cast(Any, model).config.get_text_config(), "num_hidden_layers", None)
        found = {path: stack for path, stack in found.items() if len(stack.blocks) == depth}
    if len(found) != 1:
        raise MismatchError(
            "the model must have exactly one stack of blocks with neurons as wide as the hidden states",
            expected="one stack",
            found=", ".join(found or paths) or "none",
        )
    return next(iter(found.values()))


def hidden_size(model: Any) -> int:
    """The width of a model's hidden states; a `MismatchError` if its config does not say."""
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    if not isinstance(width, int):
        raise MismatchError("the model's config has no hidden_size", found=type(model).__name__)
    return width
