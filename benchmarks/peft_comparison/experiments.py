"""Our experiments in PEFT's comparison: two JSON files each. Needs torch and peft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METHOD = "neft"
LORA_32 = 9_175_040  # trainable parameters of PEFT's lora/llama-3.2-3B-rank32, and of its SHiRA


@dataclass(frozen=True)
class Experiment:
    """What a `NeftConfig` is given, and what differs from PEFT's default training parameters."""

    config: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``adapter_config.json`` and ``training_params.json``."""
        from neftsurgery.peft import NeftConfig

        config = NeftConfig(task_type="CAUSAL_LM", **self.config).to_dict()
        config |= {"selection": self.config.get("selection")}  # a saved adapter needs no file, this one does
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("adapter_config.json", config), ("training_params.json", dict(self.training))):
            (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _optimizer(lr: float) -> dict[str, Any]:
    """The rows are values and no differences: decay would pull them to zero, and not to the base."""
    return {"optimizer_kwargs": {"lr": lr, "weight_decay": 0.0}}


EXPERIMENTS = {
    "llama-3.2-3B-random-9M": Experiment({"params": LORA_32}, _optimizer(3e-4)),
    "llama-3.2-3B-norm-9M": Experiment({"params": LORA_32, "policy": "norm"}, _optimizer(3e-4)),
    "llama-3.2-3B-units-9M": Experiment({"params": LORA_32, "anatomy": "units"}, _optimizer(3e-4)),
    "llama-3.2-3B-random-3pct": Experiment({"neurons": "3%"}, _optimizer(1e-4)),
}


def of_selection(path: Path) -> tuple[str, Experiment]:
    """The experiment of a selection or patch file, and its name."""
    return f"selection-{path.stem}", Experiment({"selection": str(path.resolve())}, _optimizer(3e-4))
