"""The live model and the tokenizer of a checkpoint, and the stack of blocks in which its neurons lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, UsageError
from ..neurons.tensor_names import layer_and_kind

__all__ = [
    "DTYPES",
    "Stack",
    "device_of",
    "hidden_size",
    "live_model",
    "outline",
    "require_whole",
    "stack_of",
    "tokenizer_of",
]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""What the model may compute in, besides ``auto``: the type of its files."""


@dataclass(frozen=True)
class Stack:
    """The blocks that a text's hidden states go through, one after the other.

    Attributes
    ----------
    path:
        The name of the list of blocks in the model, ``"model.layers"``.
    blocks:
        The blocks, first to last.
    """

    path: str
    blocks: tuple[nn.Module, ...]

    def block_of(self, live: str) -> int | None:
        """Which block a live parameter lies in; None: in none of them."""
        parent, _, number = layer_and_kind(live.split("."))[0].rpartition(".")
        return int(number) if parent == self.path and number.isdecimal() else None


def stack_of(model: nn.Module, names: Iterable[str]) -> Stack:
    """The one stack of blocks that has the live parameters ``names``; of several, that of the language model.

    Raises
    ------
    MismatchError
        If there is no such stack, or none that stands out.
    """
    paths = dict.fromkeys(layer_and_kind(name.split("."))[0].rpartition(".")[0] for name in names)
    modules = dict(model.named_modules())
    found = {}
    for path in paths:
        module = modules.get(path) if path else None
        if isinstance(module, nn.ModuleList):
            found[path] = Stack(path, tuple(module))
    if len(found) > 1:
        depth = getattr(_text_config(model), "num_hidden_layers", None)
        found = {path: stack for path, stack in found.items() if len(stack.blocks) == depth}
    if len(found) != 1:
        raise MismatchError(
            "the model is not one stack of blocks with neurons of hidden width in them",
            found=", ".join(found or paths) or "no block",
        )
    return next(iter(found.values()))


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def hidden_size(model: Any) -> int:
    """The width of its hidden states.

    Raises
    ------
    MismatchError
        If its config does not say.
    """
    width = getattr(_text_config(model), "hidden_size", None)
    if not isinstance(width, int):
        raise MismatchError("the model's config names no hidden_size", found=type(model).__name__)
    return width


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """Its tokenizer.

    Raises
    ------
    UsageError
        If there is none that can be used.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.source.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(
            "the checkpoint's folder has no tokenizer that can be used",
            file=checkpoint.name,
            hint="copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into it",
        ) from error


def require_whole(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, if it is one that can be run.

    Raises
    ------
    UsageError
        If it is a single file, or has no config.
    """
    if checkpoint.is_file or checkpoint.config is None:
        raise UsageError(
            "a model to run is a folder with a config.json",
            file=checkpoint.name,
            hint="name the whole checkpoint",
        )
    return checkpoint


def outline(checkpoint: Checkpoint) -> Any:
    """The model without its weights, to plan with.

    Raises
    ------
    UsageError
        If transformers cannot make it, or it has two streams of hidden states.
    """
    import transformers

    require_whole(checkpoint)
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.source.path, trust_remote_code=False)
        with torch.device("meta"):
            kind = _class_of(config)
            model = kind(config) if hasattr(kind, "forward") else kind.from_config(config)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise _unusable(checkpoint, error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            "an encoder with a decoder has two streams of hidden states: only models of one are looked at",
            file=checkpoint.name,
        )
    return model


def live_model(checkpoint: Checkpoint, stack: str, *, dtype: str, device: torch.device) -> Any:
    """The model with its weights, in evaluation mode; every block of ``stack`` is in the files.

    Raises
    ------
    UsageError
        If transformers cannot load it.
    MismatchError
        If weights that hidden states depend on are not in the files.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.source.path, trust_remote_code=False)
    kind = _class_of(config)
    try:
        with _quiet():
            model, info = kind.from_pretrained(
                checkpoint.source.path,
                dtype=DTYPES.get(dtype, "auto"),
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unusable(checkpoint, error) from error
    missing = sorted(key for key in info["missing_keys"] if key.startswith(f"{stack}."))
    if missing:
        raise MismatchError(
            f"{len(missing)} weights of the model are not in its files, the first one",
            file=checkpoint.name,
            tensor=missing[0],
            hint="the config.json is of another model",
        )
    model.config.use_cache = False  # a text is read once
    return model.eval().to(device)


def _class_of(config: Any) -> Any:
    """The class that the checkpoint was saved from, so that no weight is left out; else the bare model."""
    import transformers

    named = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, str(named), None)
    return kind if isinstance(kind, type) and issubclass(kind, nn.Module) else transformers.AutoModel


def _unusable(checkpoint: Checkpoint, error: Exception) -> UsageError:
    why = next(iter(str(error).splitlines()), type(error).__name__)
    return UsageError(f"transformers cannot make a model of it: {why}", file=checkpoint.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar of transformers' own while it loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def device_of(named: str) -> torch.device:
    """The device of that name; ``auto``: a GPU where torch has one.

    Raises
    ------
    UsageError
        If torch has no such device here.
    """
    if named == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(named)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them
        why = next(iter(str(error).splitlines()), "")
        raise UsageError(f"torch has no device {named!r} here", found=why) from error
    return device
