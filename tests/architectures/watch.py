"""What the modules of a running model do with their weights: an oracle that knows no class of layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["inputs_of", "output_axes"]


def inputs_of(model: Any) -> dict[str, Any]:
    """Something that the model can be run on."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 60, (2, 7), generator=draw)
    config = model.config
    size = getattr(config, "image_size", 32) or 32
    size = size if isinstance(size, int) else size[0]
    channels = getattr(config, "num_channels", 3)
    given = {
        "input_ids": tokens,
        "pixel_values": torch.randn(2, channels, size, size, generator=draw),
        "input_values": torch.randn(2, 2000, generator=draw),
        "input_features": torch.randn(
            2,
            getattr(config, "num_mel_bins", 80),
            2 * getattr(config, "max_source_positions", 8),
            generator=draw,
        ),
    }
    first = model.main_input_name
    chosen = {first: given[first]}
    if "use_cache" in inspect.signature(model.forward).parameters:
        chosen["use_cache"] = False
    if getattr(config, "is_encoder_decoder", False):
        chosen["decoder_input_ids"] = tokens[:, :5]
    return chosen


def output_axes(model: Any, inputs: dict[str, Any]) -> Iterator[tuple[str, int, bool]]:
    """Of each weight of a module that was called, and each of its axes: whether it indexes the output.

    It does if a change at one index moves the output at that index of one axis, and nowhere else.
    """
    calls: dict[str, tuple[Any, Any, Any]] = {}

    def keep(path: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            calls.setdefault(path, (args, kwargs, out))

        return hook

    hooks = [
        module.register_forward_hook(keep(path), with_kwargs=True)
        for path, module in model.named_modules()
        if any(one.ndim > 1 for one in module.parameters(recurse=False))
    ]
    with torch.no_grad():
        model(**inputs)
        for hook in hooks:
            hook.remove()
        for path, (args, kwargs, _) in calls.items():
            module = model.get_submodule(path)
            for name, weight in module.named_parameters(recurse=False):
                for axis in range(weight.ndim if weight.ndim > 1 else 0):
                    told = _indexes(module, args, kwargs, weight, axis)
                    if told is not None:
                        yield f"{path}.{name}", axis, told


def _indexes(module: Any, args: Any, kwargs: Any, weight: Any, axis: int) -> bool | None:
    size = weight.shape[axis]
    if size < 2:
        return None
    moved = []
    base = module(*args, **kwargs)
    if not isinstance(base, torch.Tensor):
        return None
    for index in (0, size - 1):
        part = weight.select(axis, index)
        kept = part.clone()
        part += torch.randn(part.shape, generator=torch.Generator().manual_seed(index))
        out = module(*args, **kwargs)
        part.copy_(kept)
        if bool((out == base).all()):  # an activation that never fires
            return None
        moved.append((out - base).abs() > 1e-6 * (1 + base.abs()))
    for other in range(base.ndim):
        places = [
            torch.nonzero(
                change.any(tuple(n for n in range(base.ndim) if n != other)) if base.ndim > 1 else change
            )
            .flatten()
            .tolist()
            for change in moved
        ]
        if base.shape[other] == size and places == [[0], [size - 1]]:
            return True
    return False
