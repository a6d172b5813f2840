"""Three toy languages and word-for-word translation between them: the task of the demo's tiny model.

A sequence is a sentence in one language, the token of the target language, and the translation. Words are
numbers. Which word has which meaning is random, so a model has to memorize each direction of translation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["NEW", "OLD", "Direction", "Languages"]

Direction: TypeAlias = tuple[int, int]
"""The source language and the target language."""

OLD: tuple[Direction, ...] = ((0, 1), (1, 2), (2, 0))
"""The directions that the base model is trained on. Every word of every language occurs on both sides."""

NEW: tuple[Direction, ...] = ((0, 2),)
"""The direction that the fine-tune adds."""

_COUNT = 3


@dataclass(frozen=True)
class Languages:
    """Three languages with random vocabularies."""

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
