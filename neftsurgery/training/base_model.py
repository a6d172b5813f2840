"""The base as transformers loads it: its tokenizer, its outline without weights, and the model itself."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..checkpoint.checkpoint import Checkpoint
from ..errors import UsageError
from .raw_examples import first_line

__all__ = ["load_model", "load_tokenizer", "outline_model"]

_AutoModel: Any = AutoModelForCausalLM


def load_tokenizer(base: Checkpoint) -> Any:
    """The tokenizer in the base's folder.

    Raises
    ------
    UsageError
        If the base is not a model folder, or has no usable tokenizer.
    """
    if base.config is None:
        raise UsageError(
            "a model to train must be a folder with a config.json",
            file=base.name,
            hint="name the whole checkpoint",
        )
    try:
        return AutoTokenizer.from_pretrained(base.source.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            "the model's folder has no usable tokenizer",
            file=base.name,
            hint="copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into it",
        ) from error


def outline_model(base: Checkpoint) -> Any:
    """The model on the meta device: names and shapes, no weights.

    Raises
    ------
    UsageError
        If transformers has no causal language model for its config.
    """
    try:
        config = AutoConfig.from_pretrained(base.source.path, trust_remote_code=False)
        with torch.device("meta"):
            return _AutoModel.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(
            f"transformers cannot build a language model from it: {first_line(error)}", file=base.name
        ) from error


def load_model(base: Checkpoint) -> Any:
    """The model, in the dtype of its files.

    Raises
    ------
    UsageError
        If transformers cannot load it.
    """
    try:
        return _AutoModel.from_pretrained(base.source.path, dtype="auto", trust_remote_code=False)
    except (ValueError, ImportError) as error:
        raise UsageError(f"transformers cannot load it: {first_line(error)}", file=base.name) from error
