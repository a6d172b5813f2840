"""Three made-up languages, and word-for-word translation between them: what the demo's model learns.

A sentence is some words of one language, the sign of the language to translate into, and the same
words in that one. Words are numbers; which word means what is drawn, so a direction of translation is
a map that has to be learnt by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["NEW", "OLD", "Direction", "Languages"]

Direction: TypeAlias = tuple[int, int]
"""From which language into which."""

OLD: tuple[Direction, ...] = ((0, 1), (1, 2), (2, 0))
"""The directions that the base model knows: every word of every language occurs on both sides."""

NEW: tuple[Direction, ...] = ((0, 2),)
"""The direction that is new to it."""

_COUNT = 3


@dataclass(frozen=True)
class Languages:
    """The languages of one world.

    Attributes
    ----------
    words:
        Of each language.
    length:
        Words of a sentence.
    seed:
        What the world is drawn from.
    """

    words: int = 16
    length: int = 8
    seed: int = 0

    @property
    def vocabulary(self) -> int:
        """How many tokens there are: the words of all languages, and a sign for each."""
        return _COUNT * (self.words + 1)

    def draw(
        self, rng: np.random.Generator, directions: Sequence[Direction], count: int
    ) -> NDArray[np.int64]:
        """``count`` sentences, int64 ``[count, 2 * length + 1]``, each direction in turn."""
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
        """The word of each language for each meaning, ``[language, meaning]``."""
        rng = np.random.default_rng(self.seed)
        return np.stack([number * self.words + rng.permutation(self.words) for number in range(_COUNT)])
