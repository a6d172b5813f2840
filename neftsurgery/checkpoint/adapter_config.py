"""The config of a PEFT LoRA adapter, checked against its base: which factors change which weight."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import CorruptFileError, MismatchError
from ..neurons.anatomy import read_anatomy
from ..tensors.document import read_object
from ..tensors.floats import FLOATS
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile
from .checkpoint import Checkpoint

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "Factor", "read_factors"]

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"

_MAX_ALPHA = 1e30  # the scale is a float32
_ENTRY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<which>[AB])\.weight")
#: Settings with which a LoRA is not ``scale * B @ A``.
_OTHER_KINDS = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Factor:
    """What an adapter adds to one weight: ``scale * B @ A``."""

    a: str  # the entry of A, [r, in], in the adapter's file
    b: str  # that of B, [out, r]
    scale: float  # alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (Kalajdzievski, 2023)
    transposed: bool  # the weight is stored [in, out]


def read_factors(config_path: Path, file: TensorFile, base: Checkpoint) -> dict[str, Factor]:
    """What the adapter adds, by tensor of the base.

    Raises a `CorruptFileError` if the config or a factor is damaged, and a `MismatchError` if the adapter is
    of a kind that cannot be read, or not for this base.
    """
    config = _read_config(config_path)
    pairs = _pairs(file)
    kinds = read_anatomy("rows", base.tensors, base.config)
    axes = {tensor.info.name: tensor.axes for tensor in kinds.scored}
    known = base.config is not None
    longer: dict[str, str] = {}
    for name in base.tensors:  # if two end alike, neither is taken
        rest = name.partition(".")[2]
        longer[rest] = "" if rest in longer else name
    found: dict[str, Factor] = {}
    for path, (a, b) in pairs.items():
        name = _tensor_of(path, base, longer, file)
        info = base.tensors[name]
        # Without a config of the base, the adapter says how a weight is stored.
        transposed = axes.get(name, (0,)) == (1,) if known else config.get("fan_in_fan_out") is True
        _check_shapes(file, info, a, b, transposed)
        rank = file.tensors[a].shape[0]
        alpha = _alpha(config, config_path, path)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
        found[name] = Factor(a, b, scale, transposed)
    if not found:
        raise MismatchError("the adapter holds no LoRA factor", file=file.path)
    return found


def _read_config(path: Path) -> dict[str, Any]:
    config = read_object(path)
    if config.get("peft_type") != "LORA":
        raise _unreadable(path, f"its type is {str(config.get('peft_type'))[:40]}, not LORA")
    for key in _OTHER_KINDS:
        if config.get(key):
            raise _unreadable(path, f"with `{key}` it is not only a low-rank sum")
    if config.get("bias", "none") != "none":
        raise _unreadable(path, f"it trains biases ({str(config['bias'])[:40]})")
    return config


def _unreadable(path: Path, what: str) -> MismatchError:
    return MismatchError(
        f"this adapter cannot be scored without merging: {what}",
        file=path,
        hint="merge it with PEFT (merge_and_unload), save the model, and diff that",
    )


def _pairs(file: TensorFile) -> dict[str, tuple[str, str]]:
    """The entries of the two factors, by module path."""
    halves: dict[str, dict[str, str]] = {}
    for name, info in file.tensors.items():
        match = _ENTRY.fullmatch(name)
        if match is None or len(info.shape) != 2:
            assert file.path is not None  # an adapter was opened by its path
            raise _unreadable(file.path, f"{name[:120]} is not a factor of a linear weight")
        if info.dtype not in FLOATS:
            raise CorruptFileError(f"{info.dtype} elements are not numbers", file=file.path, tensor=name)
        halves.setdefault(match["path"], {})[match["which"]] = name
    for entries in halves.values():
        if len(entries) != 2:
            raise CorruptFileError(
                "one of the two factors is missing", file=file.path, tensor=next(iter(entries.values()))
            )
    return {path: (halves[path]["A"], halves[path]["B"]) for path in sorted(halves)}


def _tensor_of(path: str, base: Checkpoint, longer: Mapping[str, str], file: TensorFile) -> str:
    """The base's tensor of a module. Names of a model with a head have one more part in front."""
    exact, shorter = f"{path}.weight", f"{path.partition('.')[2]}.weight"
    for name in (exact, shorter, longer.get(exact)):
        if name is not None and name in base.tensors:
            return name
    raise MismatchError(
        f"the adapter is not for {base.name}, which has no such weight",
        file=file.path,
        tensor=exact,
        found=", ".join(sorted(base.tensors)[:2])[:200],
    )


def _check_shapes(file: TensorFile, info: TensorInfo, a: str, b: str, transposed: bool) -> None:
    (rank, inputs), (outputs, other) = file.tensors[a].shape, file.tensors[b].shape
    expected = (inputs, outputs) if transposed else (outputs, inputs)
    if rank != other or rank == 0 or info.shape != expected or info.dtype not in FLOATS:
        raise MismatchError(
            "the adapter's factors do not fit this weight of the base",
            file=file.path,
            tensor=info.name,
            expected=info.describe(),
            found=f"A [{rank}, {inputs}] and B [{outputs}, {other}]",
        )


def _alpha(config: Mapping[str, Any], config_path: Path, path: str) -> float:
    """The module's alpha: that of the first pattern it ends in, else the adapter's."""
    patterns = config.get("alpha_pattern") or {}
    value = config.get("lora_alpha", 8)
    if not isinstance(patterns, dict):
        raise CorruptFileError("alpha_pattern is not an object", file=config_path)
    for pattern, alpha in patterns.items():
        plain = pattern.removeprefix("^").replace(r"\.", ".")
        if not re.fullmatch(r"[\w.-]+", plain):  # a stranger's regular expression is never run
            raise _unreadable(config_path, f"its alpha_pattern {pattern[:80]!r} is a regular expression")
        if path == plain or (not pattern.startswith("^") and path.endswith(f".{plain}")):
            value = alpha
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _MAX_ALPHA:
        raise CorruptFileError(
            "lora_alpha is not a number or too large", file=config_path, found=str(value)[:40]
        )
    return float(value)
