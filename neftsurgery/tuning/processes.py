"""Several processes that train one model: what is refused, and that all have attached the same neurons."""

from __future__ import annotations

import gc
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..errors import UsageError
from ..live.weights import is_shard
from .attached_neurons import AttachedNeurons

ENGINES = "use DDP, FSDP 2, ZeRO 1 or 2; or with ZeRO 3, a NeftConfig"
_MARKS = {"ds_id": "ZeRO 3", "_fsdp_flattened": "FSDP 1"}  # attributes that these engines give to parameters


def refuse_wrapped(model: nn.Module, trainable: bool) -> None:
    """Raise a `UsageError` for a model that DDP or ``torch.compile`` has wrapped, or to train, FSDP too."""
    inner = next((name for name in ("_orig_mod", "module") if name in model._modules), None)
    if inner == "_orig_mod" or isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise UsageError(
            f"the model is wrapped in {type(model).__name__}",
            hint=f"attach to the model itself (model.{inner}), before it is wrapped",
        )
    refuse_engines(model.named_parameters())
    refuse_tensor_parallel(model)
    wrapper = _reducer_of(model) if trainable and _in_group() else None
    if wrapper is not None:
        name = "fully_shard" if wrapper in set(model.modules()) else type(wrapper).__name__
        raise UsageError(
            f"the gradients of these neurons would not be reduced: {name} has the model already",
            hint=f"attach first, then call {name}",
        )


def refuse_engines(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise a `UsageError` for a parameter that an engine keeps elsewhere, in parts."""
    for name, parameter in parameters:
        for mark in _MARKS.keys() & parameter.__dict__.keys():
            what = f"{_MARKS[mark]} puts other tensors in the place of the weights"
            raise UsageError(what, tensor=name, hint=ENGINES)


def refuse_tensor_parallel(model: nn.Module) -> None:
    """Raise a `UsageError` for a weight that processes have parts of, unless FSDP 2 cares for it."""
    shards: dict[str, Any] = {name: one for name, one in model.named_parameters() if is_shard(one)}
    known = {id(one) for module in filter(_is_fsdp2, model.modules()) for one in module.parameters()}
    for name, shard in shards.items():
        if id(shard) not in known or sum(placement.is_shard() for placement in shard.placements) > 1:
            what = "tensor parallelism has cut this weight, and neurons do not follow"
            raise UsageError(what, tensor=name, hint="load the model without tp_plan; use DDP or FSDP 2")


def check_same_neurons(model: nn.Module, attached: Sequence[AttachedNeurons]) -> None:
    """Raise a `UsageError`, in every process that trains ``model``, unless all have the same neurons.

    All of them must call this: an optimizer's step is such a moment.
    """
    rows: Any = attached[0].rows
    if is_shard(rows):
        groups = rows.device_mesh.get_all_groups()
    else:
        groups = [getattr(_reducer_of(model) if _in_group() else None, "process_group", None)]
    sums = [zlib.crc32(f"{neurons.name} {neurons.parameter_name}".encode()) for neurons in attached]
    for group in filter(None, groups):
        most = torch.tensor([sums, [-each for each in sums]], device=rows.device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX, group)
        if (other := most[0] != -most[1]).any():
            raise UsageError(
                "the processes have attached different neurons",
                tensor=attached[int(other.nonzero()[0])].name,
                hint="attach one selection: load it from one file, or choose with one seed",
            )


def _in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _reducer_of(model: nn.Module) -> nn.Module | None:
    """What reduces the gradients of the model's parameters, or some of them, and only of those it knows."""
    inside = set(model.modules())
    if (sharded := next(filter(_is_fsdp2, inside), None)) is not None:
        return sharded
    gc.collect()  # a module does not know what wraps it
    ddp = (one for one in gc.get_objects() if issubclass(type(one), nn.parallel.DistributedDataParallel))
    return next((one for one in ddp if not inside.isdisjoint(one.modules())), None)


def _is_fsdp2(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync")  # the import of its class takes long
