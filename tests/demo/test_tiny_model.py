"""The tiny model: it learns, the same way every time. `tests/cli/test_demo.py` trains it fully."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import neftsurgery as ns
from neftsurgery.demo.tiny_model import (
    NEW,
    OLD,
    Languages,
    TrainingSettings,
    count_parameters,
    load_model,
    logits_of,
    losses_of,
    new_model,
    single_thread,
    train_parameters,
)

WORLD = Languages(words=4, length=3)


def test_it_learns_and_its_selection_is_a_patch(tmp_path: Path) -> None:
    with single_thread():
        model = new_model(WORLD, 0)
        before, steps = losses_of(model, WORLD), []
        settings = TrainingSettings(OLD, steps=8, learning_rate=3e-3)
        assert train_parameters(model, model.parameters(), WORLD, settings, steps.append) > 0
        assert steps == [1] * 8
        assert losses_of(model, WORLD).old < before.old
        model.save_pretrained(tmp_path / "base")
        with ns.diff(tmp_path / "base", tmp_path / "base", score="random") as scores:
            scores.select(neurons=5).save(tmp_path / "selection")
        settings = TrainingSettings(NEW, steps=2, learning_rate=1e-2)
        trained = load_model(tmp_path / "base")
        attached = ns.attach(trained, ns.Selection.load(tmp_path / "selection"))
        count = count_parameters(attached.parameters())
        train_parameters(trained, attached.parameters(), WORLD, settings)
        attached.patch(tmp_path / "patch")
        with ns.Patch.load(tmp_path / "patch") as patch:
            assert (patch.neurons, count) == (5, patch.selection.parameters)
            ns.apply(tmp_path / "base", patch, out=tmp_path / "patched")
        loaded = load_model(tmp_path / "patched")
        assert np.array_equal(logits_of(loaded, WORLD), logits_of(trained, WORLD))
        assert not np.array_equal(logits_of(loaded, WORLD), logits_of(model, WORLD))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_new_model_depends_on_its_seed_only(seed: int) -> None:
    one, other, third = (logits_of(new_model(WORLD, n), WORLD) for n in (seed, seed, seed + 1))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, third)
    assert count_parameters(new_model(WORLD, seed).parameters()) > 400_000
