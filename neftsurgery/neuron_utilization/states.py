"""Mean hidden states of a live model over a text, summed up layer by layer as the model runs.

The hidden states are those that transformers calls ``hidden_states``: number 0 enters the first block,
number ``i`` leaves block ``i - 1``, and the last one has gone through the final norm, if there is one. No
more than one layer's are held beside what the model itself holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MismatchError
from .models import Stack
from .text import Piece

__all__ = ["mean_states"]


def mean_states(
    model: Any,
    stack: Stack,
    batches: Iterable[Sequence[Piece]],
    *,
    padding: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """The weighted mean of the hidden states, float64 ``[blocks + 1, hidden]`` on the CPU.

    Parameters
    ----------
    model:
        A model of transformers, of which ``stack`` is a part; its head, if it has one, is not run.
    padding:
        The id that short pieces are filled up with, behind; it is masked.
    advance:
        Told of the tokens done.

    Raises
    ------
    MismatchError
        If the blocks do not hand on hidden states, or these are no numbers.
    """
    sums = _Sums(stack)
    body, device = model.base_model, next(model.parameters()).device
    hooks = sums.listen()
    try:
        with torch.inference_mode():
            for batch in batches:
                ids, mask, weights = _padded(batch, padding)
                sums.begin(weights)
                found = body(input_ids=ids.to(device), attention_mask=mask.to(device))
                sums.end(found.last_hidden_state)
                advance(sum(len(piece.ids) for piece in batch))
    finally:
        for hook in hooks:
            hook.remove()
    return sums.result()


def _padded(batch: Sequence[Piece], padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask int64, and weights float64, each ``[pieces, tokens of the longest]``."""
    width = max(len(piece.ids) for piece in batch)
    ids = torch.full((len(batch), width), padding)
    weights = torch.zeros(len(batch), width, dtype=torch.float64)
    for row, piece in enumerate(batch):
        ids[row, : len(piece.ids)] = torch.tensor(piece.ids)
        weights[row, : len(piece.ids)] = piece.weight
    return ids, (weights > 0).long(), weights


class _Sums:
    """Listens to the blocks, and adds up what they hand on."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._sums: dict[int, Tensor] = {}
        self._seen: list[int] = []
        self._weights = torch.empty(0)

    def listen(self) -> list[Any]:
        first, *_ = blocks = self._stack.blocks
        hooks: list[Any] = [first.register_forward_pre_hook(self._enters, with_kwargs=True)]
        for number, block in enumerate(blocks[:-1], 1):
            hooks.append(block.register_forward_hook(self._leaves(number)))
        return hooks

    def begin(self, weights: Tensor) -> None:
        self._weights, self._seen = weights, []

    def end(self, last: Tensor) -> None:
        self._add(len(self._stack.blocks), last)
        if self._seen != list(range(len(self._stack.blocks) + 1)):
            raise MismatchError(
                f"the blocks of {self._stack.path} are not run one after the other, each once",
                expected=f"{len(self._stack.blocks)} blocks",
                found=f"{len(self._seen) - 1} runs",
            )

    def result(self) -> Tensor:
        means = torch.stack([self._sums[number] for number in sorted(self._sums)])
        wrong = (~torch.isfinite(means).all(dim=1)).nonzero().flatten()
        if len(wrong):
            raise MismatchError(
                f"hidden state {int(wrong[0])} of {len(means)} is no number",
                hint="a wider type may hold it: float32",
            )
        return means

    def _enters(self, module: Any, args: Any, kwargs: Any) -> None:
        self._add(0, args[0] if args else kwargs.get("hidden_states"))

    def _leaves(self, number: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            self._add(number, output[0] if isinstance(output, (tuple, list)) else output)

        return hook

    def _add(self, number: int, states: Any) -> None:
        shape = tuple(states.shape) if isinstance(states, Tensor) else None
        if shape is None or len(shape) != 3 or shape[:2] != tuple(self._weights.shape):
            raise MismatchError(
                f"the blocks of {self._stack.path} do not hand on one hidden state for each token",
                expected=[*self._weights.shape, "hidden"],
                found=type(states).__name__ if shape is None else list(shape),
            )
        self._seen.append(number)
        total = self._sums.setdefault(number, torch.zeros(shape[2], dtype=torch.float64))
        for row, weights in zip(states, self._weights, strict=True):  # one piece at a time in float64
            count = int(torch.count_nonzero(weights))
            total += weights[:count] @ row[:count].cpu().double()
