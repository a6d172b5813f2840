"""The demo's languages: the same meaning in the same place, each world its own."""

from __future__ import annotations

import numpy as np

from neftsurgery.demo.tiny_model import NEW, OLD, Languages


def test_a_sentence_is_a_source_a_sign_and_a_translation():
    world = Languages(words=5, length=4)
    sentences = world.draw(np.random.default_rng(0), (*OLD, *NEW), 40)
    assert sentences.shape == (40, 9)
    assert world.vocabulary == 18
    for number, sentence in enumerate(sentences):
        source, target = (*OLD, *NEW)[number % 4]
        assert set(sentence[:4] // 5) == {source}
        assert sentence[4] == 15 + target
        assert set(sentence[5:] // 5) == {target}


def test_a_direction_is_a_map_of_words():
    world = Languages(words=6, length=5, seed=3)
    sentences = world.draw(np.random.default_rng(1), NEW, 200)
    pairs = set(zip(sentences[:, :5].ravel().tolist(), sentences[:, 6:].ravel().tolist(), strict=True))
    assert len(pairs) == len(dict(pairs)) == len({target for _, target in pairs}) == 6


def test_worlds_differ_by_seed_only():
    def draw(seed: int) -> bytes:
        return Languages(seed=seed).draw(np.random.default_rng(0), OLD, 12).tobytes()

    assert draw(1) == draw(1) != draw(2)
