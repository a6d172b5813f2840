"""A PEFT LoRA adapter on its base: its config, which factors change which weight, and the merged weights.

They are merged when they are read: in float32, as PEFT merges.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptFileError, MismatchError
from ..neurons.quantized import quantization_reasons
from ..neurons.submodels import Submodels
from ..neurons.tensor_names import read_name
from ..quantization.weight import Companion, rows_read
from ..sources.resolve import Source, resolve
from ..storage.threads import Seen
from ..tensors.arrays import Float32Array, Int64Array, RawBytes
from ..tensors.document import read_object
from ..tensors.floats import FLOATS, narrow, widen
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile
from .adapter_patterns import ranks_and_alphas, unreadable
from .checkpoint import Checkpoint, ComputedWeights

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"

_CACHED_FACTORS = 8
_MAX_ALPHA = 1e30  # the scale is a float32
_ENTRY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<which>[AB])\.weight")
#: The settings that are read, and those with which a LoRA is ``scale * B @ A`` all the same. With any other,
#: such as one of a later PEFT, it may not be.
_SETTINGS = frozenset((
    "peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "bias", "init_lora_weights",
    "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config", "lora_dropout", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying",
))  # fmt: skip
#: First factors that leave the base as it is. Of others, PEFT takes the product out of the base.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class Factor:
    """What an adapter adds to one weight: ``scale * B @ A``."""

    a: str  # the entry of A, [r, in], in the adapter's file; of a convolution [r, in, k...]
    b: str  # that of B, [out, r]; of a convolution [out, r, 1...]
    scale: float  # alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (Kalajdzievski, 2023)
    transposed: bool  # the weight is stored [in, out]


def read_factors(config_path: Path, file: TensorFile, base: Checkpoint) -> dict[str, Factor]:
    """What the adapter adds, by tensor; a `CorruptFileError` or `MismatchError` says why it is not read."""
    config = _read_config(config_path)
    pairs = _pairs(file)
    targeted = ranks_and_alphas(config, list(pairs), config_path)
    found: dict[str, Factor] = {}
    for path, (info, transposed) in _weights(pairs, base, file, config.get("fan_in_fan_out")).items():
        a, b = pairs[path]
        rank = file.tensors[a].shape[0]
        stated, alpha = targeted.get(path, (None, None))
        if stated != rank or info.name in found:
            raise MismatchError(
                "the adapter contradicts itself",
                file=config_path,
                tensor=info.name,
                expected="none by the modules it targets" if stated is None else f"rank {str(stated)[:40]}",
                found=f"factors of rank {rank}" + " a second time" * (info.name in found),
                hint="take the config that was saved with these factors",
            )
        scale = _alpha(alpha, config_path) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found[info.name] = Factor(a, b, scale, transposed)
    if not found:
        raise MismatchError("the adapter holds no LoRA factor", file=file.path)
    if not config.get("init_lora_weights", True):
        others = [name.removesuffix(".weight") for name in base.tensors.keys() - found.keys()]
        for path in sorted(ranks_and_alphas(config, others, config_path)):
            raise unreadable(file.path, f"PEFT draws the missing factors of {path[:120]} at random")
    return found


def _read_config(path: Path) -> dict[str, Any]:
    config = read_object(path)
    if config.get("peft_type") != "LORA":
        raise unreadable(path, f"its type is {str(config.get('peft_type'))[:40]}, not LORA")
    for key in sorted(config.keys() - _SETTINGS):
        if config[key] not in (None, False, []):
            raise unreadable(path, f"with `{key[:40]}` it may not be only a low-rank sum")
    if config.get("bias", "none") != "none":
        raise unreadable(path, f"it trains biases ({str(config['bias'])[:40]})")
    init = config.get("init_lora_weights")
    if init not in _INITS:
        raise unreadable(
            path,
            f"`init_lora_weights` is {str(init)[:40]}, which may move the base",
            "where it was trained, save it with PEFT's path_initial_model_for_weight_conversion, or merge it "
            "(merge_and_unload) and diff the merged model",
        )
    return config


def _pairs(file: TensorFile) -> dict[str, tuple[str, str]]:
    """The entries of the two factors, by module path."""
    halves: dict[str, dict[str, str]] = {}
    for name, info in file.tensors.items():
        match = _ENTRY.fullmatch(name)
        if match is None or len(info.shape) < 2:
            raise unreadable(file.path, f"{name[:120]} is not a factor of a linear or convolution weight")
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


def _weights(
    pairs: Mapping[str, tuple[str, str]], base: Checkpoint, file: TensorFile, flag: object
) -> dict[str, tuple[TensorInfo, bool]]:
    """By module path, the base's tensor that is changed, and whether it is stored ``[in, out]``.

    PEFT knows that by the class of a module. Here a known architecture tells it, else the shape. Where the
    shape is square, the adapter's ``fan_in_fan_out`` counts if the other weights and biases bear it out.
    """
    submodels = Submodels.of(base.config)
    quantized = quantization_reasons(base.tensors, base.config)
    tied = (base.config or {}).get("tie_word_embeddings") is not False
    longer: dict[str, str] = {}
    for name in base.tensors:  # if two end alike, neither is taken
        rest = name.partition(".")[2]
        longer[rest] = "" if rest in longer else name
    orders: dict[str, tuple[TensorInfo, set[bool]]] = {}
    for path, (a, b) in pairs.items():
        info = base.tensors[_tensor_of(path, base, longer, file)]
        parts = tuple("*" if part.isdecimal() else part for part in info.name.split("."))
        reading = read_name(parts, len(info.shape), submodels.of_name(parts))
        reason = quantized.get(info.name) or reading.reason
        if info.name in quantized or reason == "embedding" or (reason == "output head" and tied):
            raise unreadable(file.path, f"it changes {info.name[:120]} ({reason})")
        (rank, inputs, *kernel), (outputs, other, *ones) = file.tensors[a].shape, file.tensors[b].shape
        shapes = {False: (outputs, inputs, *kernel)} | ({} if kernel else {True: (inputs, outputs)})
        known = {False, True} if reading.assumed else {reading.axes == (1,)}
        fits = {order for order, shape in shapes.items() if order in known and shape == info.shape}
        even = rank == other and rank * info.elements > 0 and ones == [1] * len(kernel)
        if not fits or not even or info.dtype not in FLOATS:
            raise MismatchError(
                "the adapter's factors do not fit this weight of the base",
                file=file.path,
                tensor=info.name,
                expected=info.describe(),
                found=f"A {list(file.tensors[a].shape)} and B {list(file.tensors[b].shape)}",
            )
        orders[path] = info, fits
    told = _orders_by_bias(base).union(*(fits for _, fits in orders.values() if len(fits) == 1))
    stated = {flag is True}
    for info, fits in orders.values():
        if len(fits) > 1 and told != stated and (told or flag):
            hint = "name a base with its config.json, or merge with PEFT (merge_and_unload) and diff that"
            raise unreadable(file.path, f"nothing tells if {info.name[:120]} is stored [in, out]", hint)
    return {
        path: (info, True in (stated if len(fits) > 1 else fits)) for path, (info, fits) in orders.items()
    }


def _orders_by_bias(base: Checkpoint) -> set[bool]:
    """Whether weights are stored ``[in, out]``, of those whose bias tells it by its length."""
    found = set()
    for name, info in base.tensors.items():
        bias = base.tensors.get(f"{name.removesuffix('weight')}bias")
        if bias is not None and len(info.shape) == 2 and info.shape[0] != info.shape[1]:
            found |= {axis == 1 for axis in (0, 1) if bias.shape == (info.shape[axis],)}
    return found


def _alpha(value: object, config_path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _MAX_ALPHA:
        raise CorruptFileError(
            "lora_alpha is not a number or too large", file=config_path, found=str(value)[:40]
        )
    return float(value)


def open_pair(base: str | os.PathLike[str], tuned: str | os.PathLike[str]) -> tuple[Checkpoint, Checkpoint]:
    """Open a base and a tuned checkpoint, or a LoRA adapter of the base; raises as `read_factors`."""
    first, source = Checkpoint.open(base), resolve(tuned)
    is_adapter = (source.path / CONFIG_NAME).is_file()
    return first, AdaptedWeights.on(first, source) if is_adapter else Checkpoint.open(source)


@dataclass(frozen=True, repr=False, kw_only=True)
class AdaptedWeights(ComputedWeights):
    """A base whose tensors, in its dtypes or some in F32, have an adapter merged into them; see `on`."""

    file: TensorFile  # the adapter's factors
    shown: Mapping[str, Factor | None]  # None: only converted

    @classmethod
    def on(cls, base: Checkpoint, source: Source) -> AdaptedWeights:
        """The adapter in a folder, which may be that of a Hub repository, on an open base."""
        path = source.path
        if not (path / WEIGHTS_NAME).is_file():
            raise CorruptFileError(
                f"the adapter folder has no {WEIGHTS_NAME}",
                file=source.named,
                hint="adapters saved as .bin are not read: save it again with safetensors",
            )
        file = TensorFile.named(path / WEIGHTS_NAME)
        factors = read_factors(path / CONFIG_NAME, file, base)
        parts = (base.root, base.is_file, base.shards, base.tensors, base._home)
        return cls(source, *parts, files=base, file=file, shown={**factors})

    def in_float32(self) -> tuple[AdaptedWeights, AdaptedWeights]:
        """The base and this, with the adapted tensors in F32: what is added is seen before it is rounded."""
        short = {
            name: TensorInfo(name, "F32", info.shape)
            for name, info in self.tensors.items()
            if name in self.shown and info.dtype in FLOATS and info.type.itemsize < 4
        }
        shown = replace(self, tensors={**self.tensors, **short})
        return replace(shown, shown=dict.fromkeys(short)), shown

    @property
    def seen(self) -> Seen:
        """As of `Checkpoint`: the files of the base, and the adapter's."""
        return (*self.files.seen, self.file.seen)

    def check_unchanged(self) -> None:
        """Raise a `MachineError` if a file of the base or the adapter was edited or replaced."""
        self.files.check_unchanged()
        self.file.check_in_place()
        self.file.check_unchanged()

    def row_elements(self, info: TensorInfo) -> int:
        """Of the matrix that the factors make, also of a convolution."""
        return info.elements // info.shape[0]

    def fill(self, name: str, rows: Int64Array, out: RawBytes) -> None:
        """As of `ComputedWeights`; merged elements are rounded to the tensor's dtype."""
        stored, shown = self.files.tensors[name], self.tensors[name].dtype
        merged: NDArray[Any] = widen(rows_read(self.files, Companion(stored, 1, (0,)), rows), stored.dtype)
        if stored.dtype != "F64":
            merged = merged.astype(np.float32)
        if self.shown[name] is not None:
            left, right, scale = self._loaded(name)
            with np.errstate(all="ignore"):  # what overflows is counted where it is scored
                merged += (left[rows] @ right) * scale
        out[:] = merged.view(np.uint8) if shown == "F32" else narrow(merged, shown)

    @functools.cached_property
    def _loaded(self) -> Callable[[str], tuple[Float32Array, Float32Array, np.float32]]:
        """Gives a stored tensor's factors, ``[rows, r]`` and ``[r, columns]``, and the scale."""

        @functools.lru_cache(maxsize=_CACHED_FACTORS)
        def load(name: str) -> tuple[Float32Array, Float32Array, np.float32]:
            factor = self.shown[name]
            assert factor is not None  # checked by the caller
            with np.errstate(all="ignore"):
                a, b = (
                    widen(self.file.array_bytes(entry), self.file.tensors[entry].dtype).astype(np.float32)
                    for entry in (factor.a, factor.b)
                )
            pair = (a.T, b.T) if factor.transposed else (b, a)
            left, right = (np.ascontiguousarray(one).reshape(len(one), -1) for one in pair)
            return left, right, np.float32(factor.scale)

        return load
