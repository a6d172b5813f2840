"""Inputs that a small model takes: made from its config and the names that its forward pass takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers

__all__ = ["Unneeded", "candidates"]

_TEXT, _BATCH, _SMALL = 8, 2, 64
Inputs = dict[str, Any]


class Unneeded(Exception):
    """These inputs would be those of another candidate."""


def candidates(model: Any) -> Iterator[Callable[[], Inputs]]:
    """Functions that make inputs, those that reach the most weights first."""
    for make in _candidates(model):
        yield partial(_filled, model, make)


def _filled(model: Any, make: Callable[[], Inputs]) -> Inputs:
    """The inputs, and what else the forward pass cannot do without."""
    given = make()
    for name, one in inspect.signature(model.forward).parameters.items():
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD and name not in given:
            if name not in _REQUIRED:
                raise ValueError(f"no input of the name {name} is known")
            given[name] = _REQUIRED[name](model)
    return given


def _candidates(model: Any) -> Iterator[Callable[[], Inputs]]:
    config = model.config
    names = set(inspect.signature(model.forward).parameters)
    special = _SPECIAL.get(config.model_type)
    if special is not None:
        yield partial(special, model, names)
    if "input_ids" in names:
        if _image_token(config) is not None:
            if "image_grid_thw" in names:
                yield partial(_text_and_patches, model, names)
            if "pixel_values" in names:
                yield partial(_text_and_image, model, names)
        if _audio_token(config) is not None and "input_features" in names:
            yield partial(_text_and_sound, model, names)
        if "pixel_values" in names:
            yield partial(_both, model, names, _small)
            yield partial(_both, model, names, _image)
        yield partial(_text, model, names)
    if "grid_thw" in names:
        yield partial(_patches_alone, model, names)
    for main, makers in _MAKERS.items():
        if main in names:
            for make in makers:
                yield partial(_single, model, names, main, make)
    yield dict  # with what is required


def _single(model: Any, names: set[str], main: str, make: Callable[[Any], torch.Tensor]) -> Inputs:
    value = make(model)
    masks = {name: torch.ones(len(value), value.shape[-1], dtype=torch.long) for name in _MASKS & names}
    return {main: value, **masks, **_common(model, names)}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _tokens(config: Any, count: int = _TEXT, batch: int = _BATCH, seed: int = 0) -> torch.Tensor:
    """Ids that no config uses for something special."""
    vocabulary = next((value for value in _all(config, "vocab_size") if type(value) is int), 64)
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(min(5, vocabulary - 1), min(vocabulary, 60), (batch, count), generator=draw)


def _all(config: Any, key: str) -> Iterator[Any]:
    """The values of a key in a config and those in it, the outermost first."""
    inner = [config]
    while inner:
        one = inner.pop(0)
        value = getattr(one, key, None)
        if value is not None:
            yield value
        inner += [
            part
            for name, part in vars(one).items()
            if isinstance(part, transformers.PreTrainedConfig) and not name.startswith("_")
        ]


def _first(config: Any, *keys: str, default: Any = None) -> Any:
    for key in keys:
        for value in _all(config, key):
            return value
    return default


def _image_token(config: Any) -> int | None:
    return _first(config, "image_token_id", "image_token_index", "img_token_id", "im_token_id", "image_token")


def _audio_token(config: Any) -> int | None:
    return _first(config, "audio_token_id", "audio_token_index", "audio_token")


def _common(model: Any, names: set[str]) -> Inputs:
    config = model.config
    given: Inputs = {}
    if "use_cache" in names:
        given["use_cache"] = False
    if "decoder_input_ids" in names:
        books = _first(config, "num_codebooks", default=1) if "musicgen" in config.model_type else 1
        given["decoder_input_ids"] = _tokens(config, 5, _BATCH * books, seed=1)
    return given


def _text(model: Any, names: set[str]) -> Inputs:
    config = model.config
    given: Inputs = {"input_ids": _tokens(config), **_common(model, names)}
    if "bbox" in names:
        corner = torch.randint(0, 8, (_BATCH, _TEXT, 2), generator=torch.Generator().manual_seed(0))
        given["bbox"] = torch.cat([corner, corner + 4], -1)
    return given


def _size(config: Any) -> tuple[int, int]:
    size = _first(config, "image_size", "input_size", default=64)
    if isinstance(size, dict):
        size = [size["height"], size["width"]]
    return (size, size) if isinstance(size, int) else (size[-2], size[-1])


def _image(model: Any, batch: int = _BATCH) -> torch.Tensor:
    config = model.config
    channels = _first(config, "num_channels", "in_channels", "in_chans", default=3)
    return _random(batch, channels if isinstance(channels, int) else 3, *_size(config))


def _small(model: Any) -> torch.Tensor:
    """A smaller picture than the model is made for, which many take."""
    if max(_size(model.config)) <= _SMALL:
        raise Unneeded
    return _image(model)[..., :_SMALL, :_SMALL]


def _both(model: Any, names: set[str], image: Callable[[Any], torch.Tensor]) -> Inputs:
    return {**_text(model, names), "pixel_values": image(model)}


def _features(found: Any) -> int:
    """How many tokens the features of one picture take."""
    value = getattr(found, "pooler_output", None)
    value = found if value is None else value
    if isinstance(value, tuple | list):
        return sum(_features(one) for one in value)
    return value.shape[:-1].numel()


def _with_tokens(config: Any, token: int, count: int) -> torch.Tensor:
    text = _tokens(config, batch=1)
    return torch.cat([text[:, :3], torch.full((1, count), token), text[:, 3:]], 1)


def _text_and_image(model: Any, names: set[str]) -> Inputs:
    config = model.config
    pixels = _image(model, 1)
    extra: Inputs = {}
    if "image_sizes" in names:
        extra["image_sizes"] = torch.tensor([[pixels.shape[-2], pixels.shape[-1]]])
    owner = model if hasattr(model, "get_image_features") else model.base_model
    wanted = inspect.signature(owner.get_image_features).parameters
    known = {name: value for name, value in extra.items() if name in wanted}
    with torch.no_grad():
        count = _features(owner.get_image_features(pixels, **known))
    token = _image_token(config)
    assert token is not None
    given = {"input_ids": _with_tokens(config, token, count), "pixel_values": pixels, **extra}
    return {**given, **_mask(names, given["input_ids"], token), **_common(model, names)}


def _mask(names: set[str], ids: torch.Tensor, token: int) -> Inputs:
    given: Inputs = {}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in names:
            given[name] = (ids == token).long()
    return given


def _patches(model: Any) -> torch.Tensor:
    vision = getattr(model.config, "vision_config", model.config)
    patch = _first(vision, "patch_size", default=14)
    time = _first(vision, "temporal_patch_size", default=1)
    channels = _first(vision, "in_channels", "in_chans", "num_channels", default=3)
    return _random(int(_grid(model).prod()), channels * time * patch * patch)


def _patches_alone(model: Any, names: set[str]) -> Inputs:
    main = next(name for name in ("pixel_values", "hidden_states") if name in names)
    return {main: _patches(model), "grid_thw": _grid(model)}


def _text_and_patches(model: Any, names: set[str]) -> Inputs:
    config = model.config
    grid, pixels = _grid(model), _patches(model)
    token = _image_token(config)
    assert token is not None
    ids = _with_tokens(config, token, 4)
    start = _first(config, "vision_start_token_id", "image_start_token_id")
    if isinstance(start, int):
        ids[0, 2] = start
    given = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid}
    return {**given, **_mask(names, ids, token), **_common(model, names)}


def _mels(model: Any, batch: int = _BATCH) -> torch.Tensor:
    config = model.config
    bins = _first(config, "num_mel_bins", "n_mels", "feature_size", default=80)
    return _random(batch, bins, 2 * _first(config, "max_source_positions", default=32))


def _text_and_sound(model: Any, names: set[str]) -> Inputs:
    config = model.config
    sound = _mels(model, 1)
    owner = model if hasattr(model, "get_audio_features") else model.base_model
    extra: Inputs = {}
    for name in ("input_features_mask", "feature_attention_mask"):
        if name in names:
            extra[name] = torch.ones(1, sound.shape[-1], dtype=torch.long)
    wanted = inspect.signature(owner.get_audio_features).parameters
    known = {name: value for name, value in extra.items() if name in wanted}
    with torch.no_grad():
        count = _features(owner.get_audio_features(sound, **known))
    token = _audio_token(config)
    assert token is not None
    given = {"input_ids": _with_tokens(config, token, count), "input_features": sound, **extra}
    return {**given, **_common(model, names)}


def _frames(model: Any) -> torch.Tensor:
    config = model.config
    count = _first(config, "num_frames", "frames_per_clip", default=4)
    return _random(1, count, _first(config, "num_channels", default=3), *_size(config))


def _pair(model: Any) -> torch.Tensor:
    """Two pictures that belong together."""
    return torch.stack([_image(model), _image(model).flip(-1)], 1)


def _flat(model: Any) -> torch.Tensor:
    return _random(_BATCH, 2000)


def _sequence(*keys: str) -> Callable[[Any], torch.Tensor]:
    def make(model: Any) -> torch.Tensor:
        return _random(_BATCH, 32, _first(model.config, *keys, default=80))

    return make


def _spectrogram(model: Any) -> torch.Tensor:
    config = model.config
    length, bins = _first(config, "max_length", default=64), _first(config, "num_mel_bins", default=80)
    return _random(_BATCH, length, bins)


_MASKS = {"input_features_mask", "feature_attention_mask"}
_SIZES = ("input_dim", "input_size", "feature_size")
_MAKERS: dict[str, tuple[Callable[[Any], torch.Tensor], ...]] = {
    "pixel_values": (_small, _image, _frames, _pair),
    "input_features": (
        _mels,
        *(_sequence(key) for key in ("feature_projection_input_dim", "num_mel_bins", *_SIZES)),
        lambda model: _random(_BATCH, 1, 64, _first(model.config, "num_mel_bins", default=64)),
    ),
    "input_values": (_flat, _spectrogram, lambda model: _random(_BATCH, 1, 2000), _sequence("num_mel_bins")),
    "past_values": (
        lambda model: _random(_BATCH, _first(model.config, "context_length", default=32)),
        lambda model: _times(model),
        lambda model: _random(
            _BATCH,
            _first(model.config, "context_length", default=32),
            _first(model.config, "num_input_channels", default=1),
        ),
    ),
    "pixel_values_videos": (_frames,),
    "inputs_embeds": (_sequence("hidden_size", "d_model", "n_embd"),),
    "hidden_states": (_sequence("hidden_size", "d_model", "n_embd"), *map(_sequence, _SIZES)),
}
_HIDDEN = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")


def _hidden(model: Any) -> torch.Tensor:
    return _random(_BATCH, _TEXT, _first(model.config, *_HIDDEN, default=32))


def _grid(model: Any) -> torch.Tensor:
    merge = _first(model.config, "spatial_merge_size", "merge_size", default=2)
    return torch.tensor([[1, 2 * merge, 2 * merge]])


def _times(model: Any) -> torch.Tensor:
    lags = _first(model.config, "lags_sequence", default=[0])
    return _random(_BATCH, _first(model.config, "context_length", default=32) + max(lags))


_REQUIRED: dict[str, Callable[[Any], torch.Tensor]] = {
    "input_ids": lambda model: _tokens(model.config),
    "pixel_values": _image,
    "hidden_states": _hidden,
    "hidden_state": _hidden,
    "inputs_embeds": _hidden,
    "query_embeds": _hidden,
    "encoder_hidden_states": _hidden,
    "attention_mask": lambda model: torch.ones(_BATCH, _TEXT, dtype=torch.long),
    "position_ids": lambda model: torch.arange(_TEXT)[None].expand(_BATCH, _TEXT),
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "past_values": _times,
    "past_observed_mask": lambda model: torch.ones_like(_times(model)),
    "past_time_features": lambda model: _random(
        *_times(model).shape, _first(model.config, "num_time_features", default=1)
    ),
}
"""What a forward pass may not do without."""
_SPECIAL: dict[str, Callable[[Any, set[str]], Inputs]] = {}
"""What some types need."""
