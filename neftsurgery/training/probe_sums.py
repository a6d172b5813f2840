"""What the probes of a live model add up, batch by batch, and the scores that follow: see `docs/scores.md`.

For ``gradient``, let ``s`` be the mean over batches of the gradient's signs. A step of size ``h`` from ``w``
to ``w - h s`` is, to second order in ``h``, a cosine distance of ``h^2 r.r / (2 w.w)``, where ``r`` is the
component of ``s`` orthogonal to ``w``. The score is that distance over ``h^2``. It takes one byte per
element, the others take some numbers per neuron. The gradient of a weight is freed once it is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MismatchError, UsageError
from ..neurons.layout import Layout
from ..tensors.arrays import Float64Array
from ..tuning.forwards import LinearForward, forward_of

LARGEST = float(np.finfo(np.float32).max)
"""Of the scores."""


class Signs:
    """The sum over batches of the signs of one weight's gradient."""

    def __init__(self, weight: Tensor, layout: Layout) -> None:
        self._weight, self.layout = weight.detach(), layout
        self.total = torch.zeros_like(weight, dtype=torch.int8)
        self.count = 0

    def add(self, gradient: Tensor) -> None:
        """Add those of one batch."""
        if self.total.dtype == torch.int8 and self.count >= torch.iinfo(torch.int8).max:
            self.total = self.total.to(torch.int32)
        self.total += torch.sign(gradient).to(torch.int8)
        self.count += 1

    def sums(self, batches: int) -> Float64Array:
        """Per neuron ``w.w``, ``s.s`` and ``w.s``, ``[3, n]``."""
        w, s = self._weight.float(), self.total.float() / batches
        sums = [_total(values, self.layout) for values in (w * w, s * s, w * s)]
        return torch.stack(sums).cpu().double().numpy()


class Squares:
    """The sum over batches of one weight's squared gradient, per neuron."""

    def __init__(self, weight: Tensor, layout: Layout) -> None:
        self._weight, self.layout = weight.detach(), layout
        self.total = torch.zeros(layout.count, dtype=torch.float64)
        self.count = 0

    def add(self, gradient: Tensor) -> None:
        """Add that of one batch."""
        self.total += _total(gradient.float().square(), self.layout).cpu().double()

    def sums(self, batches: int) -> Float64Array:
        """Per neuron, with the square of its own vector, ``[2, n]``."""
        own = _total(self._weight.float().square(), self.layout)
        return torch.stack([self.total, own.cpu().double()]).numpy()


class Contrast:
    """The number, sum and squares of each neuron's activations, on two sets of texts."""

    def __init__(self, weight: Tensor, layout: Layout) -> None:
        self.layout, self.count = layout, 0
        self.total = torch.zeros(2, 3, layout.count, dtype=torch.float64)

    def add(self, texts: int, values: Tensor) -> None:
        """Add those of some tokens of one set, ``[tokens, n]``."""
        found = values.cpu().double()
        self.total[texts] += torch.stack([torch.ones_like(found), found, found.square()]).sum(1)

    def sums(self, batches: int) -> Float64Array:
        """Per neuron, the squared difference of the means over the mean variance, ``[1, n]``."""
        count, total, squares = self.total.unbind(1)
        means = total / count
        variance = (squares / count - means.square()).clamp(min=0).mean(0)
        return (means.diff(dim=0).square() / variance).nan_to_num().numpy()


def _total(values: Tensor, layout: Layout) -> Tensor:
    """The sum over each neuron's elements, ``[n]``."""
    others = [axis for axis in range(len(layout.shape)) if axis not in layout.axes]
    return (values.sum(others) if others else values).reshape(-1)


def _turns(sums: Float64Array) -> Any:
    """How far each neuron turns. A zero vector that moves gets the largest score."""
    ww, ss, ws = sums
    return np.where(ww > 0, np.maximum(ss - ws * ws / ww, 0.0) / (2 * ww), np.where(ss > 0, np.inf, 0.0))


KINDS: dict[str, tuple[Any, Callable[[Float64Array], Any]]] = {
    "gradient": (Signs, _turns),
    "fisher": (Squares, lambda sums: sums[0]),
    "gradient_over_weight": (Squares, lambda sums: np.sqrt(sums[0] / sums[1])),
    "activation": (Contrast, lambda sums: np.sqrt(sums[0])),
}
"""By score: what is added up of each weight, and what follows from a neuron's sums, or a unit's."""


def finished(score: str, sums: Float64Array) -> Float64Array:
    """The scores of neurons, from their sums, ``[n]``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.minimum(np.nan_to_num(KINDS[score][1](sums)), LARGEST)  # type: ignore[no-any-return]


def add_batches(
    model: Any, sums: Mapping[str, Any], batches: Iterable[tuple[int, Mapping[str, Tensor]]]
) -> Generator[float]:
    """Add what each batch tells of the weights, by name; yields its loss.

    Batches come with the number of their set of texts: activations count for one of two, 0 or 1.
    """
    model.eval()  # without dropout, equal batches give equal scores
    kind = type(next(iter(sums.values())))
    with (_activations if kind is Contrast else _gradients)(model, sums) as begin:
        for texts, batch in batches:
            begin(texts, batch)
            loss = model(**batch).loss
            if not torch.isfinite(loss.detach()):
                raise MismatchError("the loss of the base model is not a number", found=loss.item())
            if loss.requires_grad:
                loss.backward()
            yield loss.item()


@contextmanager
def _gradients(model: nn.Module, sums: Mapping[str, Any]) -> Iterator[Callable[..., None]]:
    """Within the context, exactly these weights have gradients, which are added up."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)

    def add(one: Any, parameter: Tensor) -> None:
        one.add(parameter.grad)
        parameter.grad = None

    with ExitStack() as hooks:
        try:
            for name, one in sums.items():
                parameter: Any = parameters[name].requires_grad_(True)
                hooks.callback(parameter.register_post_accumulate_grad_hook(partial(add, one)).remove)
            yield lambda texts, batch: None
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None


@contextmanager
def _activations(model: nn.Module, sums: Mapping[str, Any]) -> Iterator[Callable[..., None]]:
    """Within the context, what neurons of linear layers put out or take in for each token is added up."""
    now: list[Any] = []

    def add(name: str, inputs: bool, module: nn.Module, taken: Any, given: Tensor) -> None:
        (texts, mask), values, count = now, taken[0] if inputs else given, sums[name].layout.count
        if values.numel() != mask.numel() * count:
            raise MismatchError("this layer does not run once for each token", tensor=name)
        sums[name].add(texts, values.reshape(-1, count)[mask.flatten()])

    def begin(texts: int, batch: Mapping[str, Tensor]) -> None:
        now[:] = texts, batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()

    with ExitStack() as hooks, torch.no_grad():
        for name, one in sums.items():
            module = model.get_submodule(name.rpartition(".")[0])
            forward = forward_of(module)
            kind = forward.kind_of(one.layout.axes) if isinstance(forward, LinearForward) else None
            if kind is None:
                hint = "leave it out: [[exclude]]"
                raise UsageError("activations are those of linear layers", tensor=name, hint=hint)
            hooks.callback(module.register_forward_hook(partial(add, name, kind == "inputs")).remove)
        yield begin
