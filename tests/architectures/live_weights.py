"""What each tensor of a model is, as its live modules tell, under its live name and under those of the files.

A *verdict* is an order of axes (``out in``, ``in out``, ``E out in``, ``E in out``), or what else it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

__all__ = ["ORDERS", "Tensor", "live_tensors", "file_tensors"]

ORDERS = {"out in": (0,), "in out": (1,), "E out in": (0, 1), "E in out": (0, 2)}
"""Orders of axes, with the neuron axes of each."""

_AXES = {axes: order for order, axes in ORDERS.items()}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ROUTER = re.compile(r"Router|TopKGate|MoEGate|MoeGate")
_EXPERTS = re.compile(r"Expert|MLP|Mlp")
_NORM = re.compile(r"Norm")
_MOST_IDS = 2**24  # float32 counts up to here


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model or of its files."""

    name: str
    shape: tuple[int, ...]
    verdict: str
    source: str  # the live name of the tensor it comes from; the first of several
    ids: Any = None  # its neurons, numbered through the model: see `file_tensors`


def live_tensors(model: Any) -> dict[str, Tensor]:
    """Every entry of the state dict with its verdict."""
    verdicts = dict(_verdicts(model))
    found = {}
    for name, value in model.state_dict(keep_vars=True).items():
        verdict = verdicts.get(name, "a parameter of no known layer")
        if not isinstance(value, nn.Parameter):
            verdict = "buffer"
        found[name] = Tensor(name, tuple(value.shape), verdict, name)
    return found


def _verdicts(model: Any) -> Iterator[tuple[str, str]]:
    heads = _heads(model)
    routers = set(_routers(model))
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if name.endswith("bias") and parameter.ndim < 2:
                verdict = "bias"
            elif module in heads:
                verdict = "head"
            elif module in routers:
                verdict = "router"
            else:
                verdict = _verdict(module, name, parameter)
            yield full, verdict


def _verdict(module: nn.Module, name: str, parameter: Any) -> str:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, nn.modules.batchnorm._NormBase) or _NORM.search(type(module).__name__):
        return "norm"
    if hasattr(module, "parametrizations") or type(module).__name__ == "ParametrizationList":
        return "parametrized"
    if isinstance(module, Conv1D) and name == "weight":
        return "in out"
    if (
        isinstance(module, nn.Linear | _CONVOLUTIONS[0] | _CONVOLUTIONS[1] | _CONVOLUTIONS[2])
        and name == "weight"
    ):
        return "out in"
    if isinstance(module, _TRANSPOSED) and name == "weight":
        return "in out" if module.groups == 1 else "a grouped transposed convolution"
    if isinstance(module, nn.RNNBase) and name.startswith("weight_"):
        return "out in"
    if isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight"):
        return "out in"
    if hasattr(module, "is_concatenated") and name in ("gate_up_proj", "up_proj", "down_proj"):
        return "E in out" if module.is_transposed else "E out in"
    sizes = tuple(getattr(module, key, None) for key in ("num_experts", "output_size", "input_size"))
    if tuple(parameter.shape) == sizes:  # JetMoeParallelExperts
        return "E out in"
    return "a parameter of no known layer"


def _heads(model: Any) -> set[Any]:
    """Modules from hidden states to the vocabulary."""
    found = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(module, "get_output_embeddings"):
            try:
                found.add(module.get_output_embeddings())
            except Exception:  # some classes have none and say so in their own way
                continue
        vocabulary = getattr(config, "vocab_size", None)
        sizes = [value for key, value in vars(config or object).items() if "vocab" not in key]
        if isinstance(vocabulary, int) and vocabulary > 256 and vocabulary not in sizes:
            found |= {
                child
                for child in module.modules()
                if isinstance(child, nn.Linear) and child.out_features == vocabulary
            }
    return found - {None}


def _routers(model: Any) -> Iterator[Any]:
    """Modules that choose experts."""
    recorded = set()
    for module in model.modules():
        for name, recorders in (getattr(module, "_can_record_outputs", None) or {}).items():
            for recorder in recorders if isinstance(recorders, list) else [recorders]:
                target = getattr(recorder, "target_class", recorder)
                if "router" in name and isinstance(target, type) and target is not nn.Linear:
                    recorded.add(target)
    for module in model.modules():
        named = type(module) in recorded or _ROUTER.search(type(module).__name__)
        if named and not any(_EXPERTS.search(type(part).__name__) for part in module.modules()):
            yield from module.modules()
        children = dict(module.named_children())
        if any("expert" in name or "Expert" in type(child).__name__ for name, child in children.items()):
            experts = {
                value
                for key, value in vars(getattr(module, "config", None) or module).items()
                if "expert" in key and isinstance(value, int)
            }
            for name, child in children.items():
                named = isinstance(child, nn.Linear) and ("gate" in name or "router" in name)
                if named and child.out_features in {1, *experts, *_experts(children)}:
                    yield child


def _experts(children: dict[str, Any]) -> set[int]:
    """How many experts the siblings of a router are, by what they hold."""
    found = set()
    for child in children.values():
        if isinstance(child, nn.ModuleList):
            found.add(len(child))
        found |= {len(parameter) for parameter in child.parameters(recurse=False) if parameter.ndim == 3}
        found |= {value for key, value in vars(child).items() if "expert" in key and isinstance(value, int)}
    return found


def file_tensors(model: Any, live: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``live`` with its neurons numbered, and the tensors that ``save_pretrained`` would write.

    Every live neuron has a number, and its weights all hold it. What the loader's converters do to them tells
    the neuron axes in the files: those along which the numbers change. Other tensors hold one below zero.
    """
    numbered = {}
    starts: list[tuple[int, str]] = []
    start = 1
    for position, (name, tensor) in enumerate(live.items()):
        axes = ORDERS.get(tensor.verdict)
        if axes is None or len(tensor.shape) <= axes[-1]:
            numbered[name] = torch.tensor(-1.0 - position).expand(tensor.shape)
            continue
        sizes = [size if axis in axes else 1 for axis, size in enumerate(tensor.shape)]
        count = torch.Size(sizes).numel()
        numbered[name] = (
            torch.arange(start, start + count, dtype=torch.float32).view(sizes).expand(tensor.shape)
        )
        starts.append((start, name))
        start += count
    if start > _MOST_IDS:
        raise ValueError(f"{start} neurons are too many to number")
    owners = _Owners(list(live), live, starts)
    written = revert_weight_conversion(model, dict(numbered))
    return (
        {name: owners.read(name, value, numbered) for name, value in numbered.items()},
        {name: owners.read(name, value, numbered) for name, value in written.items()},
    )


@dataclass(frozen=True)
class _Owners:
    """Which live tensor a number belongs to."""

    names: list[str]
    live: dict[str, Tensor]
    starts: list[tuple[int, str]]

    def of(self, number: int) -> str:
        if number < 0:
            return self.names[-1 - number]
        return next(name for start, name in reversed(self.starts) if start <= number)

    def read(self, name: str, value: Any, numbered: dict[str, Any]) -> Tensor:
        shape = tuple(value.shape)
        if not value.numel():
            return Tensor(name, shape, "no elements", name)
        source = self.of(int(value.flatten()[0]))
        tensor = self.live[source]
        if tensor.verdict not in ORDERS:
            return Tensor(name, shape, tensor.verdict, source)
        if value is numbered[source] or (shape == tensor.shape and bool((value == numbered[source]).all())):
            return Tensor(name, shape, tensor.verdict, source, _numbers(value, ORDERS[tensor.verdict]))
        axes = tuple(
            n
            for n, size in enumerate(shape)
            if size > 1 and bool((value != value.select(n, 0).unsqueeze(n)).any())
        )
        ids = _numbers(value, axes)
        order = _AXES.get(axes)
        right = order is not None and (len(axes) == 1 or len(shape) == 3)
        unique = len(set(ids.flatten().tolist())) == ids.numel()
        return Tensor(
            name, shape, order if order and right and unique else "rearranged by the loader", source, ids
        )


def _numbers(value: Any, axes: tuple[int, ...]) -> Any:
    where = tuple(slice(None) if n in axes else 0 for n in range(value.ndim))
    return value[where].to(torch.int64)
