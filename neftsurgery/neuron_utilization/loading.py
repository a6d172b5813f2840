"""The models whose hidden states are compared, and the device they run on."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..errors import UsageError
from ..live import loading
from ..live.loading import load_tokenizer, require_model_folder
from .options import DTYPES

__all__ = ["load_model", "load_tokenizer", "meta_model", "require_model_folder", "resolve_device"]


def meta_model(checkpoint: Checkpoint) -> Any:
    """The model on the meta device, without weights: enough for planning.

    Raises UsageError if transformers cannot create it, or it is an encoder-decoder model.
    """
    model = loading.meta_model(checkpoint, "saved")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(
            "an encoder-decoder model has two streams of hidden states; only models with one are supported",
            file=checkpoint.name,
        )
    return model


def load_model(checkpoint: Checkpoint, stack: str, *, dtype: str, device: torch.device) -> Any:
    """The model with its weights, in evaluation mode. The files hold every block of ``stack``.

    Raises UsageError if transformers cannot load it, and MismatchError if the files lack weights that the
    hidden states depend on.
    """
    found: torch.dtype | Literal["auto"] = getattr(torch, dtype) if dtype in DTYPES else "auto"
    model = loading.load_model(checkpoint, "saved", dtype=found, required=stack)
    model.config.use_cache = False  # every text is read once
    return model.to(device)


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is a GPU if torch has one, otherwise the CPU.

    Raises UsageError if torch cannot use that device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of these
        reason = next(iter(str(error).splitlines()), "")
        raise UsageError(f"torch has no device {name!r}", found=reason) from error
    return device
