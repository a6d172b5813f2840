"""Loading models and tokenizers with transformers. No other module of the folder calls its loaders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, UsageError
from .options import DTYPES

__all__ = ["load_model", "load_tokenizer", "meta_model", "require_model_folder", "resolve_device"]


def require_model_folder(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, if it is a folder with a config.

    Raises
    ------
    UsageError
        If it is a single file, or has no config.
    """
    if checkpoint.is_file or checkpoint.config is None:
        raise UsageError(
            "expected a model folder with a config.json",
            file=checkpoint.name,
            hint="name the folder of the whole checkpoint",
        )
    return checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer in a checkpoint's folder.

    Raises
    ------
    UsageError
        If there is no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.source.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(
            "the checkpoint has no tokenizer that transformers can load",
            file=checkpoint.name,
            hint="copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into it",
        ) from error


def meta_model(checkpoint: Checkpoint) -> Any:
    """The model on the meta device, without weights: enough for planning.

    Raises
    ------
    UsageError
        If transformers cannot create it, or it is an encoder-decoder model.
    """
    import transformers

    require_model_folder(checkpoint)
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.source.path, trust_remote_code=False)
        with torch.device("meta"):
            model_class = _model_class(config)
            if hasattr(model_class, "forward"):
                model = model_class(config)
            else:
                model = model_class.from_config(config)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise _cannot_load(checkpoint, error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            "an encoder-decoder model has two streams of hidden states; only models with one are supported",
            file=checkpoint.name,
        )
    return model


def load_model(checkpoint: Checkpoint, stack: str, *, dtype: str, device: torch.device) -> Any:
    """The model with its weights, in evaluation mode. The files hold every block of ``stack``.

    Raises
    ------
    UsageError
        If transformers cannot load it.
    MismatchError
        If the files lack weights that the hidden states depend on.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.source.path, trust_remote_code=False)
    try:
        with _no_progress_bar():
            model, info = _model_class(config).from_pretrained(
                checkpoint.source.path,
                dtype=getattr(torch, dtype) if dtype in DTYPES else "auto",
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _cannot_load(checkpoint, error) from error
    missing = sorted(key for key in info["missing_keys"] if key.startswith(f"{stack}."))
    if missing:
        raise MismatchError(
            f"this weight of the model is not in its files (missing weights: {len(missing)})",
            file=checkpoint.name,
            tensor=missing[0],
            hint="the config.json may be of another model",
        )
    model.config.use_cache = False  # every text is read once
    return model.eval().to(device)


def _model_class(config: Any) -> Any:
    """The class that the checkpoint was saved from, so that no weight is left out, or ``AutoModel``."""
    import transformers

    architecture = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, str(architecture), None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else transformers.AutoModel


def _cannot_load(checkpoint: Checkpoint, error: Exception) -> UsageError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return UsageError(f"transformers cannot load the model: {reason}", file=checkpoint.name)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Disable the progress bar that transformers shows while loading."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is a GPU if torch has one, otherwise the CPU.

    Raises
    ------
    UsageError
        If torch cannot use that device.
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
