"""Moves of elements: what the recorder tells of the meta device is what happens to numbers in memory."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from neftsurgery.live.element_moves import MoveRecorder

Work = Callable[[list[Tensor]], list[Tensor]]

WORKS: dict[str, Work] = {
    "stack, then cat": lambda t: [torch.cat([torch.stack(t[:2]), torch.stack(t[2:])], dim=1)],
    "stack in the middle": lambda t: [torch.stack(t, dim=-1)],
    "transpose": lambda t: [t[0].transpose(0, 1).contiguous(), t[1].mT, t[2].permute(1, 0).clone()],
    "chunks": lambda t: [*torch.chunk(t[0], 2, dim=0), *(one.contiguous() for one in t[1].chunk(3, dim=1))],
    "interleave": lambda t: [t[0].reshape(2, 2, 6).transpose(0, 1).reshape(t[0].shape).contiguous()],
    "every second": lambda t: [t[0][::2], t[1][:, 1::3].contiguous()],
    "more axes": lambda t: [t[0].view(2, 2, 3, 2).permute(3, 1, 0, 2).reshape(4, 6), t[1].flatten()],
    "one of a list": lambda t: [torch.stack(t[:3]).unbind(1)[2], t[3].squeeze().unsqueeze(0)],
    "detached": lambda t: [t[0].detach(), torch.cat(tensors=[t[1].data, t[2]], dim=0)],
    "untouched": lambda t: [t[1], t[0]],
}


def followed(work: Work) -> tuple[list[Tensor], list[tuple[np.ndarray, np.ndarray]]]:
    """What ``work`` makes of numbers, and what the recorder says of each of its four tensors ``[4, 6]``."""
    numbers = [torch.arange(24.0).view(4, 6) + 100 * n for n in range(4)]
    sources = [torch.empty(4, 6, device="meta") for _ in range(4)]
    with MoveRecorder() as recorder:
        made = work(sources)
    recorder.end(made)
    return work(numbers), [recorder.follow(source, np.arange(24)) for source in sources]


def check(work: Work) -> None:
    made, found = followed(work)
    for source, (numbers, offsets) in enumerate(found):
        for element, (number, offset) in enumerate(zip(numbers, offsets, strict=True)):
            value = 100 * source + element
            if number < 0:
                assert all((each != value).all() for each in made)
            else:
                assert made[number].reshape(-1)[offset] == value


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_elements_are_where_the_recorder_says(work: Work) -> None:
    check(work)
    assert any((numbers >= 0).any() for numbers, _ in followed(work)[1])


@pytest.mark.parametrize("seed", range(30))
def test_random_sequences(seed: int) -> None:
    """Eight steps, each of views and copies of what the steps before it left, drawn by a seed."""

    def work(tensors: list[Tensor]) -> list[Tensor]:
        draw = random.Random(seed)
        for _ in range(8):
            first = tensors.pop(draw.randrange(len(tensors)))
            rows = first.shape[0]
            alike = [n for n, one in enumerate(tensors) if one.shape == first.shape]
            step = draw.choice(["turn", "halves", "join", "stack", "shape", "copy", "slice"])
            if step == "turn":
                made = [first.transpose(0, -1)]
            elif step == "halves":
                made = list(first.chunk(2, dim=draw.randrange(first.ndim)))
            elif step == "join" and alike:
                made = [torch.cat([first, tensors.pop(alike[0])], draw.randrange(first.ndim))]
            elif step == "stack" and alike:
                made = [torch.stack([tensors.pop(alike[0]), first], draw.randrange(first.ndim + 1))]
            elif step == "shape" and rows % 2 == 0:
                made = [first.reshape(2, rows // 2, *first.shape[1:]).transpose(0, 1).flatten(0, 1)]
            elif step == "slice" and rows > 1:
                made = [first[: rows // 2], first[rows // 2 :]]
            else:
                made = [first.contiguous().clone()]
            tensors += made
        return tensors

    check(lambda tensors: work([*tensors]))


CHANGED: dict[str, Work] = {
    "arithmetic": lambda t: [t[0] * 2],
    "in memory of its own": lambda t: [torch.empty_like(t[0]).copy_(t[0])],
    "padding": lambda t: [torch.nn.functional.pad(t[0], (0, 1))],
    "another dtype": lambda t: [t[0].to(torch.float64)],
}


@pytest.mark.parametrize("work", CHANGED.values(), ids=CHANGED)
def test_what_is_not_understood_has_no_origin(work: Work) -> None:
    source = torch.empty(4, 6, device="meta")
    with MoveRecorder() as recorder:
        made = work([source])
    try:
        recorder.end(made)
    except ValueError:
        return
    assert (recorder.follow(source, np.arange(24))[0] == -1).all()


@pytest.mark.parametrize("change", [lambda t: t.mul_(2), lambda t: t[0].zero_(), lambda t: t.T.add_(1)])
def test_changes_in_place_are_noticed(change: Callable[[Tensor], Tensor]) -> None:
    source = torch.empty(4, 6, device="meta")
    with MoveRecorder() as recorder:
        change(source)
    with pytest.raises(ValueError, match="in place"):
        recorder.end([source])


def test_an_element_in_two_places() -> None:
    source = torch.empty(4, 6, device="meta")
    with MoveRecorder() as recorder:
        made = [torch.cat([source, source])]
    recorder.end(made)
    with pytest.raises(ValueError, match="several places"):
        recorder.follow(source, np.arange(24))
