"""What the probes of a live model add up, batch by batch, and the scores that follow: see `docs/scores.md`.

For ``gradient``, let ``s`` be the mean over batches of the gradient's signs. A step of size ``h`` from ``w``
to ``w - h s`` is, to second order in ``h``, a cosine distance of ``h^2 r.r / (2 w.w)``, where ``r`` is the
component of ``s`` orthogonal to ``w``. The score is that distance over ``h^2``. It takes one byte per
element, the others take some numbers per neuron. The gradient of a weight is freed once it is counted.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MismatchError, UsageError
from ..neurons.layout import Layout
from ..tensors.arrays import Float64Array
from ..tuning.forwards import LinearForward, forward_of

#: Of scores.
LARGEST = float(np.finfo(np.float32).max)


class Squares:
    """The sum over batches of one weight's squared gradient, per neuron."""

    def __init__(self, weight: Tensor, layout: Layout) -> None:
        self._weight, self.layout, self.count = weight, layout, 0
        self.total = torch.zeros(layout.count, dtype=torch.float64)

    def watch(self, model: nn.Module, name: str) -> Any:
        """Have the gradient of each backward pass added; the handle undoes that."""
        hook: Any = self._weight.requires_grad_(True).register_post_accumulate_grad_hook
        return hook(self._take)

    def _take(self, parameter: Tensor) -> None:
        self.add(parameter.grad)
        parameter.grad = None

    def add(self, gradient: Any) -> None:
        """Add the gradient of one batch."""
        self.total += _per_neuron([gradient.float().square()], self.layout)[0]

    def sums(self, batches: int) -> Float64Array:
        """Per neuron, with the square of its own vector, ``[2, n]``."""
        own = _per_neuron([self._weight.detach().float().square()], self.layout)
        return torch.stack([self.total, own[0]]).numpy()


class Signs(Squares):
    """The sum over batches of the signs of one weight's gradient."""

    def __init__(self, weight: Tensor, layout: Layout) -> None:
        super().__init__(weight, layout)
        self.total = torch.zeros_like(weight, dtype=torch.int8)

    def add(self, gradient: Any) -> None:
        """Add those of one batch."""
        if self.total.dtype == torch.int8 and self.count >= torch.iinfo(torch.int8).max:
            self.total = self.total.to(torch.int32)
        self.total += torch.sign(gradient).to(torch.int8)
        self.count += 1

    def sums(self, batches: int) -> Float64Array:
        """Per neuron ``w.w``, ``s.s`` and ``w.s``, ``[3, n]``."""
        w, s = self._weight.detach().float(), self.total.float() / batches
        return _per_neuron([w * w, s * s, w * s], self.layout).numpy()


class Contrast:
    """The number, sum and squares of each neuron's activations, on two sets of texts."""

    def __init__(self, weight: Tensor, layout: Layout) -> None:
        self.layout, self.count = layout, 0
        self.total = torch.zeros(2, 3, layout.count, dtype=torch.float64)
        self.now: Any = None  # the set of texts, and where a batch has tokens

    def watch(self, model: nn.Module, name: str) -> Any:
        """Have what a linear layer's neurons put out, or take in, added; the handle undoes that."""
        module = model.get_submodule(name.rpartition(".")[0])
        forward = forward_of(module)
        kind = forward.kind_of(self.layout.axes) if isinstance(forward, LinearForward) else None
        if kind is None:
            raise UsageError("activations are those of linear layers", tensor=name, hint="[[exclude]] it")
        return module.register_forward_hook(partial(self._take, name, kind == "inputs"))

    def _take(self, name: str, inputs: bool, module: nn.Module, taken: Any, given: Tensor) -> None:
        (texts, mask), values, count = self.now, taken[0] if inputs else given, self.layout.count
        if values.numel() != mask.numel() * count:
            raise MismatchError("this layer does not run once for each token", tensor=name)
        found = values.reshape(-1, count)[mask.flatten()].cpu().double()
        self.total[texts] += torch.stack([torch.ones_like(found), found, found.square()]).sum(1)

    def sums(self, batches: int) -> Float64Array:
        """Per neuron, the squared difference of the means over the mean variance, ``[1, n]``."""
        count, total, squares = self.total.unbind(1)
        means = total / count
        variance = (squares / count - means.square()).clamp(min=0).mean(0)
        return (means.diff(dim=0).square() / variance).nan_to_num().numpy()


def _per_neuron(values: Iterable[Tensor], layout: Layout) -> Tensor:
    """The sums over each neuron's elements, ``[values, n]``."""
    others = [axis for axis in range(len(layout.shape)) if axis not in layout.axes]
    sums = [(each.sum(others) if others else each).reshape(-1) for each in values]
    return torch.stack(sums).cpu().double()


KINDS: dict[str, Any] = {
    "gradient": Signs, "fisher": Squares, "gradient_over_weight": Squares, "activation": Contrast
}  # fmt: skip
"""What is added up of each weight, by score."""


def finished(score: str, sums: Float64Array) -> Float64Array:
    """The scores of neurons, or of units, from their sums, ``[n]``."""
    first, *more = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        if score == "gradient":  # a zero vector that moves gets the largest
            ss, ws = more
            turns = np.maximum(ss - ws * ws / first, 0.0) / (2 * first)
            first = np.where(first > 0, turns, np.where(ss > 0, np.inf, 0.0))
        elif score != "fisher":
            first = np.sqrt(first / more[0] if more else first)
        scores: Float64Array = np.minimum(np.nan_to_num(first), LARGEST)
    return scores


def add_batches(
    model: Any, sums: Mapping[str, Any], batches: Iterable[tuple[int, Mapping[str, Tensor]]]
) -> Generator[float]:
    """Add what each batch tells of the weights, by name; yields its loss. No other weight has a gradient.

    Batches come with the number of their set of texts: activations count for one of two, 0 or 1.
    """
    model.eval()  # without dropout, equal batches give equal scores
    with ExitStack() as undone:
        undone.callback(model.zero_grad)
        for parameter in model.parameters():
            undone.callback(parameter.requires_grad_, parameter.requires_grad)
        model.requires_grad_(False)
        for name, one in sums.items():
            undone.callback(one.watch(model, name).remove)
        for texts, batch in batches:
            for one in sums.values():
                one.now = texts, batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            loss = model(**batch).loss
            if not torch.isfinite(loss.detach()):
                raise MismatchError("the loss of the base model is not a number", found=loss.item())
            if loss.requires_grad:
                loss.backward()
            yield loss.item()
