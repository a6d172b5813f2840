"""Every model type as a small model that runs: real weights, and inputs that it takes.

`tiny_models` makes the configs. Here vocabularies shrink too, with the token ids that configs name.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from .model_inputs import Unneeded, candidates
from .tiny_models import LADDER, classes_of, config_of

__all__ = ["Runnable", "configs_in", "move_weights", "outputs", "runnable", "tiny_config"]

_MOST_TOKENS, _VOCABULARY, _FIRST_ID = 4096, 499, 100
_MOST_PARAMETERS = 8_000_000
_TOO_MANY_PARAMETERS = 100_000_000
_TOKEN_ID = re.compile(r"token(_id|_index|_idx)?$|_token_ids?$|token_index$|_id$|_ids$")
_TOP = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_WIDTHS = ("hidden_size", "d_model", "embed_dim", "n_embd", "dim")
_HEADS = ("num_attention_heads", "num_heads", "n_head", "num_key_value_heads", "encoder_attention_heads")
_PREFERRED = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining")


@dataclass
class Runnable:
    """A model with inputs, if any were found that it takes."""

    model: Any
    inputs: dict[str, Any] | None
    why: str = ""  # it does not run

    def run(self, model: Any = None) -> list[torch.Tensor]:
        """The floating-point tensors that come out; of another model of the same class, if one is given."""
        assert self.inputs is not None
        return outputs(self.model if model is None else model, self.inputs)


def runnable(model_type: str) -> Runnable:
    """The first class of the type that runs, as small as it does; else the first that can be built.

    Raises if none can.
    """
    built: Runnable | None = None
    why = ""
    for cls in _classes(model_type):
        found = None
        for factor, layers, fewer in [(*rung, fewer) for rung in LADDER for fewer in (False, True)]:
            try:
                model = _build(cls, tiny_config(model_type, factor, layers, fewer), found is not None)
            except Exception as error:
                why = why or _told(error)
                continue
            if model is None:
                break
            found = Runnable(model, *_inputs(model))
            if found.inputs is not None:
                return found
            built = built or found
    if built is None:
        raise ValueError(why or "no model class of its own")
    return built


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _classes(model_type: str) -> list[type]:
    """Those that write text first."""
    rank = {name: place for place, name in enumerate(_PREFERRED)}
    return sorted(
        classes_of(model_type),
        key=lambda one: min((rank[end] for end in rank if one.__name__.endswith(end)), default=9),
    )


def tiny_config(model_type: str, factor: int, layers: int, fewer_heads: bool = False) -> Any:
    """A config of a model that is small in memory, and quick; with heads that divide its width."""
    config = config_of(model_type, factor, layers)
    for key in ("image_token_id", "image_token_index", "audio_token_id"):
        if getattr(config, key, 0) is None:
            _set(config, key, _FIRST_ID - 1)
    ids: set[int] = set()
    for part in configs_in(config):
        for value in _token_ids(part).values():
            numbers = value if isinstance(value, list) else [value]
            ids.update(number for number in numbers if number >= _FIRST_ID)
    new = {number: _FIRST_ID + place for place, number in enumerate(sorted(ids))}
    shrinks = any(_vocabularies(part) for part in configs_in(config)) and len(new) < _VOCABULARY - _FIRST_ID
    for part in configs_in(config):
        _cut_layers(part)
        if fewer_heads:
            _fit_heads(part)
        _fit_rope(part)
        _fit_experts(part)
        if shrinks:
            for key, value in _token_ids(part).items():
                changed = [new.get(n, n) for n in value] if isinstance(value, list) else new.get(value, value)
                _set(part, key, changed)
            for key in _vocabularies(part):
                _set(part, key, _VOCABULARY)
    return config


def configs_in(config: Any) -> Iterator[Any]:
    """A config and all those in it."""
    yield config
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig) and not key.startswith("_"):
            yield from configs_in(value)


def _fit_heads(config: Any) -> None:
    """As many heads as leave each of them some multiple of four elements."""
    width = next((value for key in _WIDTHS if type(value := getattr(config, key, None)) is int), 0)
    heads = next((one for one in (8, 4, 2, 1) if width and width % (4 * one) == 0), None)
    for key in _HEADS if heads else ():
        value = getattr(config, key, None)
        if type(value) is int and value > (heads or 0):
            _set(config, key, heads)
    if heads and type(getattr(config, "head_dim", None)) is int:
        _set(config, "head_dim", width // heads)


def _fit_rope(config: Any) -> None:
    """Sections of rotary embeddings that fill a smaller head."""
    rope = getattr(config, "rope_parameters", None)
    module = sys.modules.get(type(config).__module__.replace(".configuration_", ".modeling_"))
    if not isinstance(rope, dict) or module is None or "mrope_section" not in inspect.getsource(module):
        return
    heads = getattr(config, "num_attention_heads", 1)
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    if any(isinstance(value, dict) for value in rope.values()):  # one for each type of layer
        return
    half = int(head * rope.get("partial_rotary_factor", 1)) // 2
    config.rope_parameters = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


def _fit_experts(config: Any) -> None:
    """Fewer experts a token, and fewer groups, than there are experts."""
    for key in _TOP:
        value = getattr(config, key, None)
        if type(value) is int and value > 2:
            _set(config, key, 2)
    if getattr(config, "topk_group", None) and getattr(config, "n_group", None):
        config.n_group, config.topk_group = 2, 1


def _cut_layers(config: Any) -> None:
    """What a config says of single layers, without those that are gone."""
    told = config.to_dict().get("per_layer_config")
    if told:
        kept = {key: value for key, value in told.items() if int(key) < config.num_hidden_layers}
        config.per_layer_config = None
        config.per_layer_config = kept or None


def _vocabularies(config: Any) -> list[str]:
    return [
        key
        for key, value in vars(config).items()
        if "vocab" in key and type(value) is int and value > _MOST_TOKENS
    ]


def _token_ids(config: Any) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(config).items()
        if _TOKEN_ID.search(key)
        and (type(value) is int or (isinstance(value, list) and all(type(one) is int for one in value)))
    }


def _set(config: Any, key: str, value: Any) -> None:
    try:
        setattr(config, key, value)
    except Exception:
        return


def _build(cls: Any, config: Any, built: bool) -> Any:
    """A model with weights none of which is zero or one, and that are not alike in two layers.

    None if it were a large one, and a smaller one was built.
    """
    with tempfile.TemporaryDirectory() as folder:  # as files will have it
        config.save_pretrained(folder)
        config = type(config).from_pretrained(folder)
    with torch.device("meta"):
        size = sum(one.numel() for one in cls(copy.deepcopy(config)).parameters())
    if size > _MOST_PARAMETERS and built:
        return None
    if size > _TOO_MANY_PARAMETERS:
        raise ValueError(f"the smallest has {size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = cls(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some are never initialised
            parameter[~(parameter.abs() < 1e3)] = 0
    move_weights(model, 0)
    return model


def move_weights(model: Any, seed: int, share: float = 0.05) -> None:
    """Add a little noise to every weight."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(share * torch.randn(parameter.shape, generator=draw))


def _inputs(model: Any) -> tuple[dict[str, Any] | None, str]:
    """The first inputs that the model takes; else the first and the last reason why not."""
    reasons: list[str] = []
    for make in candidates(model):
        try:
            inputs = make()
            with (
                torch.no_grad()
            ):  # a copy: Swin keeps the size of its windows from the first pictures it sees
                found = outputs(copy.deepcopy(model), inputs)
        except Unneeded:
            continue
        except Exception as error:
            reasons.append(_told(error)[:100])
            continue
        if found and all(bool(torch.isfinite(one).all()) for one in found):
            return inputs, ""
        reasons.append("what comes out is not finite" if found else "no tensor comes out")
    return None, "; ".join(dict.fromkeys((*reasons[:1], *reasons[-2:-1])))


def outputs(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The floating-point tensors that come out, with the same random numbers each time."""
    torch.manual_seed(0)
    return list(_tensors(model(**inputs), 0))


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif depth < 4 and isinstance(value, dict):
        for key, one in value.items():
            if not str(key).endswith("attentions"):  # heads have places there
                yield from _tensors(one, depth + 1)
    elif depth < 4 and isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one, depth + 1)
