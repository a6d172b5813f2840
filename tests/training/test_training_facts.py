"""The manifest's account of a training, as it is written now and as earlier versions wrote it."""

from __future__ import annotations

import json

from neftsurgery.training.loss_curve import LossPoint, TrainingFacts

#: As the version before typed facts wrote it.
WRITTEN = json.loads(
    '{"data": "data.jsonl", "examples": 16, "examples_digest": "0f", "probe": "gradients", "steps": 6,'
    ' "batch_size": 4, "accumulate": 1, "learning_rate": 0.01, "schedule": "linear", "warmup": 0.0,'
    ' "weight_decay": 0.0, "clip": 1.0, "mode": "auto", "seed": 0, "more": {}, "train_loss": 2.5,'
    ' "curve": [{"step": 2, "train_loss": 2.75, "dev_loss": 3.0}, {"step": 4, "train_loss": 2.5}],'
    ' "seconds": 1.25, "torch": "2.9.0", "transformers": "5.0.0"}'
)


def test_an_older_account_is_read_and_written_back() -> None:
    facts = TrainingFacts.from_json(WRITTEN)
    assert (facts.data, facts.train_loss, facts.dev_loss, facts.best_step) == ("data.jsonl", 2.5, None, None)
    assert facts.curve == (LossPoint(2, 2.75, 3.0), LossPoint(4, 2.5))
    assert facts.options["learning_rate"] == 0.01
    assert facts.to_json() == WRITTEN
