"""The training record of a manifest, which may hold any JSON."""

from __future__ import annotations

import pytest

from neftsurgery.reporting.training_record import loss_figure, training_facts


def test_the_loss_curve_of_a_manifest():
    curve = [{"step": 10, "train_loss": 2.0}, {"step": 20, "train_loss": 1.5, "dev_loss": 1.7}]
    figure = loss_figure({"training": {"curve": curve, "steps": 20, "data": "x.jsonl"}})
    assert figure is not None
    assert figure.table.rows == ((10, 2.0, None), (20, 1.5, 1.7))
    assert figure.png().startswith(b"\x89PNG")
    assert training_facts({"training": {"steps": 2000, "data": "\x1b[2J"}}) == [
        ("steps", "2,000"),
        ("data", "\\x1b[2J"),
    ]


@pytest.mark.parametrize(
    "training",
    [
        None,
        [],
        "x",
        {},
        {"curve": "x"},
        {"curve": [1, None, {}]},
        {"curve": [{"step": "1", "train_loss": 1}]},
        {"curve": [{"step": 1, "train_loss": True}]},
        {"curve": [{"step": 1, "train_loss": 10**400}]},
        {"curve": [{"step": -1, "train_loss": 1.0}]},
    ],
)
def test_a_manifest_may_hold_any_training_record(training):
    assert loss_figure({"training": training}) is None
    training_facts({"training": training})
