"""The training record of a manifest, which may hold any JSON."""

from __future__ import annotations

import pytest

from neftsurgery.reporting.training_record import loss_figure, training_facts
from neftsurgery.tensors.document import Facts


def test_the_loss_curve_of_a_manifest():
    curve = [{"step": 10, "train_loss": 2.0}, {"step": 20, "train_loss": 1.5, "dev_loss": 1.7}]
    figure = loss_figure(Facts({"curve": curve, "steps": 20, "data": "x.jsonl"}))
    assert figure is not None
    assert figure.table.rows == ((10, 2.0, None), (20, 1.5, 1.7))
    assert figure.png().startswith(b"\x89PNG")
    assert training_facts(Facts({"steps": 2000, "data": "\x1b[2J"})) == [
        ("steps", "2,000"),
        ("data", "\\x1b[2J"),
    ]


def test_a_record_of_an_earlier_version_is_shown():
    written = Facts(
        {"data": "data.jsonl", "examples": 16, "probe": "gradients", "steps": 6, "learning_rate": 0.01,
         "curve": [{"step": 2, "train_loss": 2.75, "dev_loss": 3.0}, {"step": 4, "train_loss": 2.5}],
         "more": {}, "seconds": 1.25, "torch": "2.9.0"}
    )  # fmt: skip
    assert dict(training_facts(written)) == {
        "data": "data.jsonl", "examples": "16", "probe": "gradients", "steps": "6", "learning rate": "0.01",
        "seconds": "1.25", "torch": "2.9.0",
    }  # fmt: skip
    figure = loss_figure(written)
    assert figure is not None
    assert figure.table.rows == ((2, 2.75, 3.0), (4, 2.5, None))


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
    assert loss_figure(Facts.from_json(training)) is None
    training_facts(Facts.from_json(training))
