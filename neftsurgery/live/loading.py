"""Transformers models of checkpoints: the tokenizer, the model without weights, the model with weights.

Only this module calls ``from_pretrained``. It never runs a checkpoint's own code and shows no progress bars.
If transformers cannot load a model, the `UsageError` gives transformers' reason.
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

ModelClass: TypeAlias = Literal["causal_lm", "saved"]
"""``causal_lm``: transformers' ``AutoModelForCausalLM``. ``saved``: the class that the checkpoint was saved
from, so that every weight of its files is loaded; ``AutoModel`` where its config does not name one."""

# What transformers raises for configs, tokenizers and classes that it cannot use.
_FAILURES = (
    OSError, ValueError, LookupError, ImportError, AttributeError, TypeError, ArithmeticError,
    StrictDataclassError,
)  # fmt: skip


def require_model_folder(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint; a `UsageError` unless it is a folder with a config."""
    if checkpoint.is_file or checkpoint.config is None or checkpoint.source.remote:
        kind = "a URL" if checkpoint.source.remote else "a single file"
        raise UsageError(
            "expected a model folder with a config.json",
            file=checkpoint.name,
            found="no config.json" if checkpoint.config is None else kind,
            hint="name the folder of the whole checkpoint",
        )
    return checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of ``checkpoint``; a `UsageError` if transformers cannot load it."""
    from transformers import AutoTokenizer

    require_model_folder(checkpoint)
    try:
        return AutoTokenizer.from_pretrained(checkpoint.source.path, trust_remote_code=False)
    except _FAILURES as error:
        raise UsageError(
            "the checkpoint has no tokenizer that transformers can load",
            file=checkpoint.name,
            hint="copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into it",
        ) from error


def meta_model(checkpoint: Checkpoint, model_class: ModelClass) -> Any:
    """The model without its weights, from the config alone; a `UsageError` if it cannot be built."""
    require_model_folder(checkpoint)
    try:
        config = _config(checkpoint)
        found = _class_of(config, model_class)
        with torch.device("meta"):
            # A model class is called with the config; an auto class cannot be called.
            if issubclass(found, nn.Module):
                return found(config)
            return found.from_config(config, trust_remote_code=False)
    except (*_FAILURES, RuntimeError) as error:  # torch raises RuntimeErrors for impossible sizes
        raise _load_error(checkpoint, error) from error


def load_model(
    checkpoint: Checkpoint,
    model_class: ModelClass,
    *,
    dtype: torch.dtype | str = "auto",
    required: str | None = None,
    **options: Any,
) -> Any:
    """The model with its weights, on the CPU, in evaluation mode; errors if they do not fit it.

    ``dtype`` and ``options``, such as ``attn_implementation``, are transformers' own.
    The files must have every weight in the module ``required``: others are initialised at random if missing.
    """
    require_model_folder(checkpoint)
    try:
        with without_progress_bars():
            model, info = _class_of(_config(checkpoint), model_class).from_pretrained(
                checkpoint.source.path,
                dtype=dtype,
                **options,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
    except _FAILURES as error:
        raise _load_error(checkpoint, error) from error
    _check_loaded(checkpoint, info, required)
    return model.eval()


def require_quantization(options: Mapping[str, Any]) -> None:
    """Raise a `UsageError` unless transformers knows these options to quantize, and can do it here."""
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        AutoHfQuantizer.from_config(dict(options)).validate_environment()
    except _FAILURES as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"transformers cannot quantize the model: {reason}") from error


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
    missing = sorted(name for name in info["missing_keys"] if required and name.startswith(f"{required}."))
    if missing:
        raise MismatchError(
            f"this weight of the model is not in its files (missing weights: {len(missing)})",
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
    if isinstance(error, OSError) and error.errno is not None:
        raise error  # the machine's; transformers raises OSErrors of its own without a number
    first, *rest = str(error).splitlines() or [type(error).__name__]
    reason = " ".join([first, *(line.strip() for line in rest[:1])]) if first.endswith(":") else first
    return UsageError(f"transformers cannot load the model: {reason}", file=checkpoint.name)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Within the context, transformers shows no progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
