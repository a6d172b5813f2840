"""Planning the analysis: whatever can be wrong is found before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.opening import open_checkpoint
from ..errors import MismatchError, UsageError, boundary
from ..live.names import live_names
from ..neurons.anatomy import NeuronTensor
from ..patch.patch import PATCH_KEY, Patch
from ..selection.budget import Amount
from ..sources.resolve import resolve
from ..surgery.diff import describe_side
from ..surgery.extract import check_selection
from ..surgery.verify import verify
from ..tensors.header import read_header
from .models import DTYPES, device_of, hidden_size, outline, require_whole, stack_of, tokenizer_of
from .scope import looked_at, outside
from .text import Text, read_text

__all__ = ["BATCH", "LENGTH", "TOKENS", "States", "UtilizationPlan", "plan_utilization"]

States: TypeAlias = Literal["preceding", "following", "all"]
"""Which hidden states a neuron is compared with: those before its block, those from it on, or both."""

TOKENS = 32_768
LENGTH = 512
BATCH = 4096


@dataclass(frozen=True)
class UtilizationPlan:
    """A planned analysis; no weight is loaded yet.

    Attributes
    ----------
    base:
        The checkpoint before training.
    tuned:
        What it became: a patch of it, or another checkpoint.
    text:
        As tokens.
    padding:
        The token that short pieces are filled up with.
    tensors, blocks:
        What is looked at: by name, the neurons and the number of the block they lie in.
    outside:
        Trained neurons that are not looked at; None where only a comparison will tell.
    stack:
        The name of the list of blocks.
    states, strongly:
        As they were asked for.
    batch:
        Tokens that go through the model at once.
    dtype, device:
        What it computes in, and on.
    """

    base: Checkpoint
    tuned: Patch | Checkpoint
    text: Text
    padding: int
    tensors: Mapping[str, NeuronTensor]
    blocks: Mapping[str, int]
    outside: int | None
    stack: str
    states: States
    strongly: Amount | None
    batch: int
    dtype: str
    device: torch.device

    @property
    def neurons(self) -> int:
        """How many neurons are looked at."""
        return sum(t.layout.count if t.part is None else t.part.count for t in self.tensors.values())

    def describe(self) -> dict[str, Any]:
        """For JSON, and for ``--dry-run``: what is compared, and how."""
        if isinstance(self.tuned, Patch):
            patch = {"name": self.tuned.path.name if self.tuned.path else None, "neurons": self.tuned.neurons}
            other: dict[str, Any] = {"patch": patch | {"outside": self.outside}}
        else:
            other = {"tuned": describe_side(self.tuned)}
        return {
            "base": describe_side(self.base),
            **other,
            "text": self.text.describe(),
            "states": self.states,
            "strongly": None if self.strongly is None else self.strongly.describe(),
            "dtype": self.dtype,
        }


@boundary
def plan_utilization(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str] | Patch,
    text: str | os.PathLike[str],
    *,
    anatomy: str | None = None,
    states: States = "preceding",
    strongly: str | int | None = None,
    tokens: int = TOKENS,
    length: int | None = None,
    batch: int = BATCH,
    dtype: str = "auto",
    device: str = "auto",
) -> UtilizationPlan:
    """Check all that the analysis needs; see `neftsurgery.neuron_utilization.measure.utilization`."""
    _check(states, dtype, tokens=tokens, length=length, batch=batch)
    amount = None if strongly is None else Amount.parse(strongly)
    first = open_checkpoint(base)
    try:
        model = outline(first)
        second = _other(first, tuned)
        chosen = second.selection if isinstance(second, Patch) else None
        tensors = looked_at(first, chosen, anatomy, hidden_size(model))
        live = live_names(model, tensors)
        stack = stack_of(model, live.values())
        blocks = {name: number for name in tensors if (number := stack.block_of(live[name])) is not None}
        tensors = {name: tensors[name] for name in blocks}
        tokenizer = tokenizer_of(first)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
        content = read_text(text, tokenizer, tokens=tokens, length=min(length or LENGTH, longest))
        _check_vocabulary(first, model, content)
    finally:
        first.close()
    return UtilizationPlan(
        first,
        second,
        content,
        tokenizer.pad_token_id or 0,
        tensors,
        blocks,
        None if chosen is None else outside(chosen, tensors),
        stack.path,
        states,
        amount,
        batch,
        dtype,
        device_of(device),
    )


def _check(states: str, dtype: str, **counts: int | None) -> None:
    if states not in get_args(States):
        raise UsageError("there are no such states", expected="preceding, following or all", found=states)
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError("there is no such dtype", expected=f"auto, {', '.join(DTYPES)}", found=dtype)
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{name} must be at least 1", found=count)


def _other(base: Checkpoint, tuned: str | os.PathLike[str] | Patch) -> Patch | Checkpoint:
    """What the base became, opened; a patch fits it, and every vector it replaces is the base's."""
    if not isinstance(tuned, Patch):
        source = resolve(tuned)
        if source.path.is_dir() or PATCH_KEY not in read_header(source.path).metadata:
            return require_whole(open_checkpoint(source))
        tuned = Patch.load(source.path)
    check_selection(tuned.selection, base)
    found = verify(base.source.path, tuned)
    if not found.holds("base"):
        raise MismatchError(
            "the patch is not of this base",
            file=base.name,
            expected="base, in every vector that it replaces",
            found=found.state,
            hint="name the checkpoint that the patch was made from",
        )
    return tuned


def _check_vocabulary(base: Checkpoint, model: Any, text: Text) -> None:
    known = model.get_input_embeddings().num_embeddings
    largest = max(max(piece.ids) for piece in text.pieces)
    if largest >= known:
        raise MismatchError(
            "the tokenizer has tokens that the model does not know",
            file=base.name,
            expected=f"ids below {known}",
            found=largest,
            hint="the folder has the tokenizer of another model",
        )
