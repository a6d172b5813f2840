"""The demo's tiny model: a Llama with half a million parameters, trained on the toy languages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from ..checkpoint.checkpoint import Checkpoint
from ..live import loading

_TEST_EXAMPLES = 512


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of AdamW without weight decay, with warm-up and linear decay to zero."""

    directions: tuple[Direction, ...]  # the directions of translation to learn
    steps: int
    learning_rate: float
    batch_size: int = 32  # examples per step
    seed: int = 0


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropy of the translations on unseen sentences, in nats per word."""

    old: float
    new: float


@contextmanager
def single_thread() -> Iterator[None]:
    """Within the context, torch uses one thread, which is faster here; transformers shows no bars."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with loading.without_progress_bars():
            yield
    finally:
        torch.set_num_threads(threads)


def new_model(languages: Languages, seed: int) -> Any:
    """An untrained model."""
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


def load_model(folder: Path) -> Any:
    """The model of a checkpoint, by transformers."""
    return loading.load_model(Checkpoint.open(folder), "causal_lm")


def train_parameters(
    model: Any,
    parameters: Iterable[nn.Parameter],
    languages: Languages,
    settings: TrainingSettings,
    advance: Callable[[int], object] = lambda steps: None,
) -> float:
    """Train ``parameters`` of ``model``; returns the seconds that it took."""
    began = time.perf_counter()
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    rng = np.random.default_rng(settings.seed)
    model.train()
    for step in range(settings.steps):
        share = min((step + 1) / 20, 1 - step / settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = share * settings.learning_rate
        loss = _loss(model, languages, languages.draw(rng, settings.directions, settings.batch_size))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        advance(1)
    model.eval()
    return time.perf_counter() - began


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """The number of scalars in the parameters."""
    return sum(parameter.numel() for parameter in parameters)


def losses_of(model: Any, languages: Languages) -> Losses:
    """The losses on the old task and on the new one."""

    def loss(directions: Sequence[Direction]) -> float:
        examples = languages.draw(np.random.default_rng(languages.seed + 2), directions, _TEST_EXAMPLES)
        with torch.no_grad():
            return _loss(model.eval(), languages, examples).item()

    return Losses(loss(OLD), loss(NEW))


def logits_of(model: Any, languages: Languages) -> NDArray[np.float32]:
    """The logits on fixed examples of all directions; equal models give equal bits."""
    ids = languages.draw(np.random.default_rng(languages.seed + 1), (*OLD, *NEW), 64)
    with torch.no_grad():
        logits: NDArray[np.float32] = model.eval()(input_ids=torch.from_numpy(ids)).logits.numpy()
    return logits


def _loss(model: Any, languages: Languages, examples: NDArray[np.int64]) -> Tensor:
    ids, start = torch.from_numpy(examples), languages.length
    logits = model(input_ids=ids, use_cache=False).logits[:, start:-1]
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, start + 1 :].flatten())


Direction: TypeAlias = tuple[int, int]
"""The source language and the target language."""

OLD: tuple[Direction, ...] = ((0, 1), (1, 2), (2, 0))
"""The directions that the base model is trained on. Every word of every language occurs on both sides."""

NEW: tuple[Direction, ...] = ((0, 2),)
"""The direction that the fine-tune adds."""

_COUNT = 3


@dataclass(frozen=True)
class Languages:
    """Three languages of numbers with random meanings, which have to be learnt, and their translations."""

    words: int = 16  # words per language
    length: int = 8  # words per sentence
    seed: int = 0  # the seed of the vocabularies

    @property
    def vocabulary(self) -> int:
        """The number of tokens: the words of all languages, and one token per language."""
        return _COUNT * (self.words + 1)

    def draw(
        self, rng: np.random.Generator, directions: Sequence[Direction], count: int
    ) -> NDArray[np.int64]:
        """``count`` sequences, int64 ``[count, 2 * length + 1]``, cycling through the directions."""
        words = self._words()
        meaning = rng.integers(0, self.words, (count, self.length))
        which = np.arange(count) % len(directions)
        source, target = np.array(directions)[which].T
        return np.concatenate(
            [
                words[source[:, None], meaning],
                (_COUNT * self.words + target)[:, None],
                words[target[:, None], meaning],
            ],
            axis=1,
        )

    def _words(self) -> NDArray[np.int64]:
        """The word for each meaning in each language, ``[language, meaning]``."""
        rng = np.random.default_rng(self.seed)
        return np.stack([number * self.words + rng.permutation(self.words) for number in range(_COUNT)])
