"""The loss curve: from a Trainer's log to the points in a patch's manifest."""

from __future__ import annotations

import json
from pathlib import Path

from neftsurgery.training.loss_curve import LossPoint, curve_from_log, losses_of, plot_curve, write_curve


def test_a_log_becomes_one_point_per_step():
    log = [
        {"step": 0, "eval_loss": 3.0, "eval_runtime": 1.0},
        {"step": 2, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.5},
        {"step": 2, "eval_loss": 2.5},
        {"step": 2, "train_runtime": 9.0},
        {"step": 1, "loss": 2.25},
    ]
    assert curve_from_log(log) == (
        LossPoint(0, dev_loss=3.0), LossPoint(1, train_loss=2.25), LossPoint(2, 2.0, 2.5, 1e-3, 0.5)
    )  # fmt: skip


def test_a_point_reads_back_what_it_writes(tmp_path: Path):
    points = [LossPoint(0, dev_loss=3.0), LossPoint(1, 2.0, None, 1e-3, 0.5)]
    write_curve(points, tmp_path / "losses.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "dev_loss": 3.0}
    assert [LossPoint(**line) for line in lines] == points
    assert plot_curve(points, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes()[1:4] == b"PNG"


def test_a_short_curve_is_kept_whole_without_what_is_not_a_loss():
    points = [LossPoint(1, train_loss=2.0, learning_rate=1e-3), LossPoint(2, gradient_norm=1.0)]
    assert losses_of(points) == [LossPoint(1, train_loss=2.0)]


def test_a_long_curve_is_thinned_and_keeps_every_dev_loss():
    points = [LossPoint(step, 1.0 / step, 2.0 if step % 100 == 0 else None) for step in range(1, 1001)]
    kept = losses_of(points, most=50)
    assert len(kept) == 50
    assert [point.step for point in kept] == sorted({point.step for point in kept})
    assert sum(point.dev_loss is not None for point in kept) == 10
    assert kept[0].step == 1
    assert all(point in points for point in kept)


def test_more_dev_losses_than_there_is_room_for_are_spaced_evenly():
    points = [LossPoint(step, dev_loss=1.0) for step in range(1000)]
    kept = losses_of(points, most=5)
    assert [point.step for point in kept] == [0, 250, 500, 749, 999]
    assert losses_of([LossPoint(0, train_loss=1.0), *points], most=5) == kept
