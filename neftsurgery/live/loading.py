"""Transformers models of checkpoints: the tokenizer, the model without weights, the model with weights.

This is the only place that calls ``from_pretrained``. It never runs a checkpoint's own code, it shows no
progress bars, and what transformers cannot load is a `UsageError` that gives the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, UsageError

__all__ = ["ModelClass", "check_loadable", "load_model", "load_tokenizer", "meta_model"]

ModelClass: TypeAlias = Literal["causal_lm", "saved"]
"""``causal_lm``: transformers' ``AutoModelForCausalLM``. ``saved``: the class that the checkpoint was saved
from, so that every weight of its files is loaded; ``AutoModel`` where its config does not name one."""

# What transformers raises for configs, tokenizers and classes that it cannot use.
_FAILURES = (
    OSError, ValueError, LookupError, ImportError, AttributeError, TypeError, ArithmeticError,
    StrictDataclassError,
)  # fmt: skip


def check_loadable(checkpoint: Checkpoint) -> None:
    """Check that ``checkpoint`` is a folder with a config.

    Raises
    ------
    UsageError
        If it is a single file, or has no config.
    """
    if checkpoint.is_file or checkpoint.config is None:
        raise UsageError(
            "a model is loaded from a folder with a config.json",
            file=checkpoint.name,
            found="a single file" if checkpoint.is_file else "no config.json",
            hint="name the folder of the whole checkpoint",
        )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of ``checkpoint``.

    Raises
    ------
    UsageError
        If the checkpoint is not a folder with a config, or transformers cannot load its tokenizer.
    """
    from transformers import AutoTokenizer

    check_loadable(checkpoint)
    try:
        return AutoTokenizer.from_pretrained(checkpoint.source.path, trust_remote_code=False)
    except _FAILURES as error:
        raise UsageError(
            "the checkpoint's folder has no tokenizer that can be used",
            file=checkpoint.name,
            hint="copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into it",
        ) from error


def meta_model(checkpoint: Checkpoint, model_class: ModelClass) -> Any:
    """The model without its weights, on the meta device. Reads only the config.

    Raises
    ------
    UsageError
        If the checkpoint is not a folder with a config, or transformers cannot build the model.
    """
    check_loadable(checkpoint)
    try:
        config = _config(checkpoint)
        found = _class_of(config, model_class)
        with torch.device("meta"):
            # A class of models is called; one of the auto classes cannot be.
            if issubclass(found, nn.Module):
                return found(config)
            return found.from_config(config, trust_remote_code=False)
    except (*_FAILURES, RuntimeError) as error:  # torch's, for a size that cannot be
        raise _load_error(checkpoint, error) from error


def load_model(
    checkpoint: Checkpoint,
    model_class: ModelClass,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    required: str | None = None,
) -> Any:
    """The model with its weights, on the CPU, in evaluation mode.

    Parameters
    ----------
    dtype:
        The dtype of the weights; ``auto``: as in the files.
    required:
        The path of a module, such as ``model.layers``: the files must have every weight in it. Without
        this, transformers initialises missing weights at random, and warns.

    Raises
    ------
    UsageError
        If the checkpoint is not a folder with a config, or transformers cannot load the model.
    MismatchError
        If a weight in the files has another shape, or the files lack a weight of ``required``.
    """
    check_loadable(checkpoint)
    try:
        with _no_progress_bar():
            model, info = _class_of(_config(checkpoint), model_class).from_pretrained(
                checkpoint.source.path,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
    except _FAILURES as error:
        raise _load_error(checkpoint, error) from error
    _check_loaded(checkpoint, info, required)
    return model.eval()


def _check_loaded(checkpoint: Checkpoint, info: Mapping[str, Any], required: str | None) -> None:
    hint = "check that config.json belongs to these weights"
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise MismatchError(
            "the model that config.json describes has a weight of another shape",
            file=checkpoint.name,
            tensor=name,
            expected=list(expected),
            found=list(found),
            hint=hint,
        )
    if required is None:
        return
    if missing := sorted(name for name in info["missing_keys"] if name.startswith(f"{required}.")):
        raise MismatchError(
            f"weights of the model are not in its files: {len(missing)}, this one first",
            file=checkpoint.name,
            tensor=missing[0],
            hint=hint,
        )


def _config(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(checkpoint.source.path, trust_remote_code=False)


def _class_of(config: Any, model_class: ModelClass) -> Any:
    import transformers

    if model_class == "causal_lm":
        return transformers.AutoModelForCausalLM
    named = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, str(named), None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else transformers.AutoModel


def _load_error(checkpoint: Checkpoint, error: Exception) -> UsageError:
    first, *rest = str(error).splitlines() or [type(error).__name__]
    reason = " ".join([first, *(line.strip() for line in rest[:1])]) if first.endswith(":") else first
    return UsageError(f"transformers cannot load this model: {reason}", file=checkpoint.name)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
