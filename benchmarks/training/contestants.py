"""The contestants' training methods: each prepares the frozen model and names its parameters. Needs torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training.models import LINEAR, linears
from neftsurgery.neurons.layout import Layout
from neftsurgery.selection.selection import Chosen, Selection
from neftsurgery.tensors.header import TensorInfo
from neftsurgery.tuning.attached import attach

KINDS = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass
class TrainingMethod:
    """How a contestant trains.

    ``before_step`` runs between the backward pass and the optimizer's step. ``changeable`` is how many
    numbers can change, where that is fewer than the optimizer holds.
    """

    model: Any
    parameters: list[nn.Parameter]
    before_step: Callable[[], None] = field(default=lambda: None)
    changeable: int | None = None

    @property
    def trainable(self) -> int:
        return self.changeable or sum(p.numel() for p in self.parameters)


def prepare(name: str, model: Any) -> TrainingMethod:
    """The training method of the contestant ``name``."""
    kind, _, rest = name.partition("-")
    if kind == "tokens":
        return _tokens_neft(model) if rest == "neft" else _tokens_peft(model)
    share = int(rest) / 100 if rest else 0.0
    methods = (_floor, _neft, _units, _overlay, _masked, _full, _lora, _shira, _peft, _supertuning, _miss)
    methods += (_experts_floor, _experts, _experts_peft, _experts_lora, _experts_full)
    return {method.__name__[1:]: method for method in methods}[kind](model, share)


def rows(model: Any, share: float, seed: int = 2) -> dict[str, Tensor]:
    """A random ``share`` of the rows of each weight: ascending indices by the weight's name."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in linears(model).items():
        count = max(1, round(share * module.out_features))
        drawn = torch.randperm(module.out_features, generator=generator)[:count]
        found[f"{name}.weight"] = drawn.sort().values
    return found


def units(model: Any, share: float) -> dict[str, Tensor]:
    """As many parameters as `rows` in whole feed-forward units: rows of gate and up, columns of down."""
    parameters = sum(
        len(index) * model.get_parameter(name).shape[1] for name, index in rows(model, share).items()
    )
    generator, config = torch.Generator().manual_seed(3), model.config
    count = max(1, round(parameters / (3 * config.hidden_size * config.num_hidden_layers)))
    found = {}
    for layer in range(config.num_hidden_layers):
        drawn = torch.randperm(config.intermediate_size, generator=generator)[:count].sort().values
        for kind in ("gate", "up", "down"):
            found[f"model.layers.{layer}.mlp.{kind}_proj.weight"] = drawn
    return found


def selection_of(model: Any, picks: dict[str, Tensor], columns: str = "") -> Selection:
    """A selection of rows; of columns in weights whose names contain ``columns``."""
    tensors = {}
    for name, index in sorted(picks.items()):
        weight = model.get_parameter(name)
        info = TensorInfo(name, KINDS[weight.dtype], tuple(weight.shape))
        axis = int(bool(columns) and columns in name)
        tensors[name] = Chosen(info, Layout.of(weight.shape, (axis,)), index.numpy())
    return Selection(tensors, {"policy": "random"})


def _neft(model: Any, share: float, mode: Any = "scatter") -> TrainingMethod:
    attached = attach(model, selection_of(model, rows(model, share)), base=False, mode=mode)
    return TrainingMethod(model, list(attached.parameters()))


def _units(model: Any, share: float) -> TrainingMethod:
    attached = attach(model, selection_of(model, units(model, share), "down_proj"), base=False)
    return TrainingMethod(model, list(attached.parameters()))


def _overlay(model: Any, share: float) -> TrainingMethod:
    return _neft(model, share, "overlay")


def _floor(model: Any, share: float) -> TrainingMethod:
    """Trains nothing. Gradients flow back exactly as far as those of the other contestants.

    The first trained modules are the first layer's query, key and value projections. The gradients of their
    outputs are needed. Those of their inputs are not, since everything before them is frozen for all.
    """

    def start(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_(True)

    first = model.model.layers[0].self_attn
    for module in (first.q_proj, first.k_proj, first.v_proj):
        module.register_forward_hook(start)
    return TrainingMethod(model, [])


def _full(model: Any, share: float) -> TrainingMethod:
    weights = [module.weight for module in linears(model).values()]
    for weight in weights:
        weight.requires_grad_(True)
    return TrainingMethod(model, weights)


def _masked(model: Any, share: float) -> TrainingMethod:
    """The published method: gradients of whole weights, multiplied by a mask before the optimizer's step."""
    method, masks, count = _full(model, share), [], 0
    for name, index in rows(model, share).items():
        weight = model.get_parameter(name)
        mask = torch.zeros(len(weight), 1, dtype=weight.dtype, device=weight.device)
        mask[index.to(weight.device)] = 1
        masks.append((weight, mask))
        count += len(index) * weight.shape[1]

    def before_step() -> None:
        for weight, mask in masks:
            assert weight.grad is not None
            weight.grad.mul_(mask)

    return TrainingMethod(model, method.parameters, before_step, count)


def _rank(model: Any, share: float) -> int:
    """The rank whose number of parameters is nearest to NeFT's."""
    widths = sum(m.in_features + m.out_features for m in linears(model).values())
    return max(1, round(_wanted(model, share) / widths))


def _wanted(model: Any, share: float) -> int:
    """How many parameters NeFT trains."""
    modules = linears(model)
    return sum(
        len(index) * modules[name.removesuffix(".weight")].in_features
        for name, index in rows(model, share).items()
    )


def _lora(model: Any, share: float) -> TrainingMethod:
    from peft import LoraConfig, get_peft_model

    rank = _rank(model, share)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LINEAR), lora_dropout=0.0)
    return _adapted(get_peft_model(model, config))


def _shira(model: Any, share: float) -> TrainingMethod:
    from peft import ShiraConfig, get_peft_model

    smallest = min(
        m.in_features * m.out_features // (m.in_features + m.out_features) for m in linears(model).values()
    )
    config = ShiraConfig(r=min(_rank(model, share), smallest), target_modules=list(LINEAR), random_seed=0)
    return _adapted(get_peft_model(model, config))


def _supertuning(model: Any, share: float) -> TrainingMethod:
    from peft import SupertuningConfig, get_peft_model

    return _adapted(get_peft_model(model, SupertuningConfig(sparsity=1 - share, target_modules=list(LINEAR))))


def _miss(model: Any, share: float) -> TrainingMethod:
    from peft import MissConfig, get_peft_model

    outputs = sum(module.out_features for module in linears(model).values())
    rank = max(1, round(_wanted(model, share) / outputs))
    return _adapted(get_peft_model(model, MissConfig(r=rank, target_modules=list(LINEAR))))


def _peft(model: Any, share: float) -> TrainingMethod:
    from peft import get_peft_model

    from neftsurgery.peft import NeftConfig

    count = sum(map(len, rows(model, share).values()))
    return _adapted(get_peft_model(model, NeftConfig(neurons=count, target_modules=list(LINEAR))))


def _experts_floor(model: Any, share: float) -> TrainingMethod:
    """As `_floor`; the first trained weights are those of the first layer's experts."""

    def start(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(True)

    model.model.layers[0].mlp.register_forward_hook(start)
    return TrainingMethod(model, [])


def _experts(model: Any, share: float) -> TrainingMethod:
    """Rows of each expert's three projections, under their names in files."""
    generator, config, tensors = torch.Generator().manual_seed(2), model.config, {}
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for layer, expert in itertools.product(range(config.num_hidden_layers), range(config.num_experts)):
        for kind, shape in shapes.items():
            name = f"model.layers.{layer}.mlp.experts.{expert}.{kind}.weight"
            index = torch.randperm(shape[0], generator=generator)[: max(1, round(share * shape[0]))]
            info = TensorInfo(name, KINDS[model.dtype], shape)
            tensors[name] = Chosen(info, Layout.of(shape, (0,)), index.sort().values.numpy())
    selection = Selection(dict(sorted(tensors.items())), {"policy": "random"})
    return TrainingMethod(model, list(attach(model, selection, base=False).parameters()))


def _experts_peft(model: Any, share: float) -> TrainingMethod:
    from peft import get_peft_model

    from neftsurgery.peft import NeftConfig

    config = NeftConfig(neurons=f"{100 * share:g}%", target_modules=["experts"])
    return _adapted(get_peft_model(model, config))


def _stacks(model: Any) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if ".experts." in name}


def _experts_full(model: Any, share: float) -> TrainingMethod:
    stacks = list(_stacks(model).values())
    for weight in stacks:
        weight.requires_grad_(True)
    return TrainingMethod(model, stacks)


def _experts_lora(model: Any, share: float) -> TrainingMethod:
    from peft import LoraConfig, get_peft_model

    stacks = _stacks(model)
    count = share * sum(weight.numel() for weight in stacks.values())
    rank = max(1, round(count / sum(len(one) * (one.shape[1] + one.shape[2]) for one in stacks.values())))
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=[], target_parameters=sorted(stacks), lora_dropout=0.0
    )
    return _adapted(get_peft_model(model, config))


def _entries(model: Any) -> Tensor:
    count = model.config.vocab_size
    generator = torch.Generator().manual_seed(3)
    return torch.randperm(count, generator=generator)[: math.ceil(0.03 * count)].sort().values


def _tokens_neft(model: Any) -> TrainingMethod:
    selection = selection_of(model, {"model.embed_tokens.weight": _entries(model)})
    return TrainingMethod(model, list(attach(model, selection, base=False).parameters()))


def _tokens_peft(model: Any) -> TrainingMethod:
    from peft import TrainableTokensConfig, get_peft_model

    indices = _entries(model).tolist()
    return _adapted(
        get_peft_model(model, TrainableTokensConfig(token_indices=indices, target_modules=["embed_tokens"]))
    )


def _adapted(model: Any) -> TrainingMethod:
    parameters: Iterable[nn.Parameter] = model.parameters()
    return TrainingMethod(model.train(), [p for p in parameters if p.requires_grad])
