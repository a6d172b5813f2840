"""What the modules of a small model are called with when it runs, on the CPU and on random inputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

__all__ = ["Call", "Calls", "possible_inputs"]

_MOST_ELEMENTS = 300_000_000  # of a model that is run
_MOST_TRIES = 80
_TOKENS = 7


@dataclass(frozen=True)
class Call:
    """One call of a module of a running model."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Calls:
    """The first call of each module of ``model``, which is on the meta device. It is run when first asked."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.why = ""  # what kept the model from running
        self._found: dict[str, Call] | None = None

    def of(self, path: str) -> Call | None:
        """The call of the module at ``path``; None if there was none."""
        if self._found is None:
            self._found = {}
            try:
                self._run()
            except Exception as error:
                self.why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return self._found.get(path)

    def _run(self) -> None:
        if sum(one.numel() for one in self.model.parameters()) > _MOST_ELEMENTS:
            raise ValueError("too large to run")
        torch.manual_seed(0)
        model = type(self.model)(_eager(copy.deepcopy(self.model.config))).eval()
        _randomize(model)
        found: dict[str, Call] = {}

        def keep(path: str) -> Any:
            def hook(module: Any, args: Any, kwargs: Any) -> None:
                if path not in found:
                    found[path] = Call(module, _cloned(args), _cloned(kwargs))

            return hook

        for path, module in model.named_modules():
            module.register_forward_pre_hook(keep(path), with_kwargs=True)
        reasons = []
        with torch.no_grad():
            for inputs in islice(possible_inputs(model), _MOST_TRIES):
                try:
                    model(**inputs)
                except Exception as error:
                    reasons.append(f"{type(error).__name__}: {error}".splitlines()[0][:200])
                    continue
                break
            else:
                self.why = reasons[0] if reasons else "no inputs are known"
        for module in model.modules():
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks_with_kwargs.clear()
        self._found = found


def _eager(config: Any) -> Any:
    """The config with plain operations, which run in any precision and at any size."""
    for one in (config, *(one for one in vars(config).values() if hasattr(one, "model_type"))):
        one._attn_implementation = one._experts_implementation = "eager"
    return config


def _randomize(model: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.dtype.is_floating_point and value.ndim:
                value.copy_(torch.randn(value.shape, generator=draw) * value.shape[-1] ** -0.5)


def _cloned(value: Any) -> Any:
    """A copy whose tensors later calls do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_cloned(one) for one in value)
    if type(value) is dict:
        return {key: _cloned(one) for key, one in value.items()}
    return value


def possible_inputs(model: Any) -> Iterator[dict[str, Any]]:
    """Things that the model may be run on, the likeliest first."""
    draw = torch.Generator().manual_seed(0)
    forward = inspect.signature(model.forward).parameters
    first = model.main_input_name
    tokens = torch.randint(5, 60, (1, _TOKENS), generator=draw)
    rest: dict[str, Any] = {"use_cache": False} if "use_cache" in forward else {}
    if "decoder_input_ids" in forward:
        rest["decoder_input_ids"] = tokens[:, :5]
    if "bbox" in forward:
        rest["bbox"] = torch.randint(1, 8, (1, _TOKENS, 1), generator=draw).expand(-1, -1, 4).clone()

    def noise(name: str, *shape: int) -> dict[str, Any]:
        return {name: torch.randn(shape, generator=draw), **rest}

    if "input_ids" in forward and first != "pixel_values":
        yield {"input_ids": tokens, **rest}
        yield {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **rest}
    if "pixel_values" in forward:
        for shape in _image_shapes(model.config):
            pixels = noise("pixel_values", *shape)
            yield pixels
            if "input_ids" in forward:
                yield {"input_ids": tokens, **pixels}
    if first == "input_ids":
        return
    known = ("input_values", "input_features", "hidden_states", "inputs_embeds", "spectrogram", first)
    for name in dict.fromkeys(name for name in known if name in forward and name != "pixel_values"):
        for shape in _sound_shapes(model.config):
            yield noise(name, *shape)
            if "attention_mask" in forward and len(shape) == 3:
                yield {**noise(name, *shape), "attention_mask": torch.ones(shape[:2], dtype=torch.long)}


def _values(config: Any, names: str) -> list[Any]:
    """What a config, and those in it, have under any of these names."""
    holders = [config, *(one for one in vars(config).values() if hasattr(one, "model_type"))]
    return [getattr(one, name) for one in holders for name in names.split() if getattr(one, name, None)]


def _image_shapes(config: Any) -> Iterator[tuple[int, ...]]:
    counts = _values(config, "num_channels in_channels in_chans")
    channels = next((one for one in counts if isinstance(one, int)), 3)
    stated = [one for one in _values(config, "image_size crop_size") if isinstance(one, int | list | tuple)]
    frames = [one for one in _values(config, "num_frames") if isinstance(one, int)]
    for size in [*stated[:2], 64, 32, 128, 224, 256]:
        yield (1, channels, *((size, size) if isinstance(size, int) else tuple(size)[:2]))
    for size in [*stated[:1], 64, 32, 224]:
        plane = (size, size) if isinstance(size, int) else tuple(size)[:2]
        for count in [*frames, 2]:
            yield from ((1, count, channels, *plane), (1, channels, count, *plane))


def _sound_shapes(config: Any) -> Iterator[tuple[int, ...]]:
    yield from ((1, 4000), (1, 1, 4000))
    widths = _values(
        config,
        "num_mel_bins num_mels hidden_size d_model feature_size input_dim n_mels input_size "
        "input_feat_per_channel",
    )
    lengths = [2 * one for one in _values(config, "max_source_positions") if isinstance(one, int)][:1]
    for width in dict.fromkeys([*(one for one in widths if isinstance(one, int)), 80, 128]):
        for length in [*lengths, _TOKENS, 64, 1024]:
            yield from ((1, length, width), (1, width, length), (1, 1, length, width), (length, width))
