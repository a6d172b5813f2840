"""The loss curve that goes into a patch's manifest."""

from __future__ import annotations

from neftsurgery.training.curve import losses_of


def test_a_short_curve_is_kept_whole_without_what_is_no_loss():
    points = [{"step": 1, "train_loss": 2.0, "learning_rate": 1e-3}, {"step": 2, "gradient_norm": 1.0}]
    assert losses_of(points) == [{"step": 1, "train_loss": 2.0}]


def test_a_long_curve_is_thinned_and_keeps_every_dev_loss():
    points = [
        {"step": step, "train_loss": 1.0 / step} | ({"dev_loss": 2.0} if step % 100 == 0 else {})
        for step in range(1, 1001)
    ]
    kept = losses_of(points, most=50)
    assert len(kept) == 50
    assert [point["step"] for point in kept] == sorted({point["step"] for point in kept})
    assert sum("dev_loss" in point for point in kept) == 10
    assert kept[0]["step"] == 1
    assert all(point in points for point in kept)


def test_more_dev_losses_than_there_is_room_for_are_spaced_evenly():
    points = [{"step": step, "dev_loss": 1.0} for step in range(1000)]
    kept = losses_of(points, most=5)
    assert [point["step"] for point in kept] == [0, 250, 500, 749, 999]
    assert losses_of([{"step": 0, "train_loss": 1.0}, *points], most=5) == kept
