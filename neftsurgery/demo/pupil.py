"""The demo's model: a Llama of half a million parameters, which really learns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from ..selection.selection import Selection
from ..tuning.attach import attach
from .languages import NEW, OLD, Direction, Languages

__all__ = [
    "Lesson",
    "Losses",
    "alone",
    "answers",
    "born",
    "count",
    "learn",
    "learn_neurons",
    "load",
    "losses",
]

_EXAMINED = 512  # sentences


@dataclass(frozen=True)
class Lesson:
    """What is learnt, and how: AdamW without weight decay, warm-up, then a straight line to zero."""

    directions: tuple[Direction, ...]
    steps: int
    learning_rate: float
    sentences: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropy of the translations, in nats a word, on sentences nobody learnt from."""

    old: float
    new: float


@contextmanager
def alone() -> Iterator[None]:
    """One thread, since work this small gains little by two and loses much on a busy machine; no bars."""
    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def born(languages: Languages, seed: int) -> Any:
    """A model that has learnt nothing yet."""
    config = LlamaConfig(
        vocab_size=languages.vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4 * languages.length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load(folder: Path) -> Any:
    """The model of a checkpoint, as anyone would load it."""
    return AutoModelForCausalLM.from_pretrained(folder)


def learn(
    model: Any,
    parameters: Iterable[nn.Parameter],
    languages: Languages,
    lesson: Lesson,
    done: Callable[[int], object] = lambda steps: None,
) -> float:
    """Train ``parameters`` of ``model``; returns the seconds it took."""
    began = time.perf_counter()
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=lesson.learning_rate, weight_decay=0.0)
    rng = np.random.default_rng(lesson.seed)
    model.train()
    for step in range(lesson.steps):
        share = min((step + 1) / 20, 1 - step / lesson.steps)
        for group in optimizer.param_groups:
            group["lr"] = share * lesson.learning_rate
        loss = _loss(model, languages, languages.draw(rng, lesson.directions, lesson.sentences))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done(1)
    model.eval()
    return time.perf_counter() - began


def learn_neurons(
    base: Path,
    selection: Path,
    patch: Path,
    languages: Languages,
    lesson: Lesson,
    done: Callable[[int], object] = lambda steps: None,
) -> tuple[Any, int, float]:
    """Train the neurons of ``selection`` from ``base``, and cut ``patch``.

    Returns the model with them in force, how many parameters were trained, and the seconds it took.
    """
    model = load(base)
    attached = attach(model, Selection.load(selection))
    parameters = list(attached.parameters())
    seconds = learn(model, parameters, languages, lesson, done)
    attached.patch(patch)
    return model, count(parameters), seconds


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers they hold."""
    return sum(parameter.numel() for parameter in parameters)


def losses(model: Any, languages: Languages) -> Losses:
    """On the old task and on the new one."""
    return Losses(*(_examine(model, languages, directions) for directions in (OLD, NEW)))


def answers(model: Any, languages: Languages) -> NDArray[np.float32]:
    """The logits on sentences of all directions: what two equal models agree on to the bit."""
    ids = languages.draw(np.random.default_rng(languages.seed + 1), (*OLD, *NEW), 64)
    with torch.no_grad():
        logits: NDArray[np.float32] = model.eval()(input_ids=torch.from_numpy(ids)).logits.numpy()
    return logits


def _examine(model: Any, languages: Languages, directions: Sequence[Direction]) -> float:
    sentences = languages.draw(np.random.default_rng(languages.seed + 2), directions, _EXAMINED)
    with torch.no_grad():
        return _loss(model.eval(), languages, sentences).item()


def _loss(model: Any, languages: Languages, sentences: NDArray[np.int64]) -> Tensor:
    ids, start = torch.from_numpy(sentences), languages.length
    logits = model(input_ids=ids, use_cache=False).logits[:, start:-1]
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, start + 1 :].flatten())
