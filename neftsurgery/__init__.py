"""Neuron-level fine-tuning and surgery on model checkpoints.

Score every neuron of two checkpoints, cut the sensitive ones out as a patch, apply it, verify it
and take it out again, bit for bit::

    import neftsurgery as ns

    scores = ns.diff("base/", "tuned/")
    selection = scores.select(neurons="3%")
    patch = ns.extract("base/", "tuned/", selection, out="neuron_patch.safetensors")
    ns.apply("base/", patch, out="patched/")
    assert ns.verify("patched/", patch).state == "patched"
    ns.revert("patched/", patch, out="back/", base="base/")

Importing the package loads nothing: each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import CorruptFileError, MachineError, MismatchError, NeftError, UsageError
from .version import __version__

if TYPE_CHECKING:
    from .checkpoint.checkpoint import Checkpoint
    from .checkpoint.healing import HealResult, heal
    from .hub.pull import pull
    from .hub.push import PushResult, push
    from .live.apply_live import apply_live
    from .live.export_lora import export_lora
    from .neuron_utilization.result import Utilization
    from .neuron_utilization.utilization import utilization
    from .patch.lossless import LosslessPatch
    from .patch.patch import Patch
    from .reporting.report import report
    from .scoring.scores import Scores
    from .selection.selection import Selection
    from .surgery.apply import apply, revert
    from .surgery.diff import diff
    from .surgery.export import ExportResult
    from .surgery.extract import extract
    from .surgery.inspect import Inspection, inspect
    from .surgery.merge import merge
    from .surgery.rewrite import RewriteResult
    from .surgery.verify import Verification, verify
    from .training.train import TrainResult, train
    from .tuning.attached import Attached, attach
    from .tuning.trainer import PatchSaving

__all__ = [
    "Attached",
    "Checkpoint",
    "CorruptFileError",
    "ExportResult",
    "HealResult",
    "Inspection",
    "LosslessPatch",
    "MachineError",
    "MismatchError",
    "NeftError",
    "Patch",
    "PatchSaving",
    "PushResult",
    "RewriteResult",
    "Scores",
    "Selection",
    "TrainResult",
    "UsageError",
    "Utilization",
    "Verification",
    "__version__",
    "apply",
    "apply_live",
    "attach",
    "diff",
    "export_lora",
    "extract",
    "heal",
    "inspect",
    "merge",
    "pull",
    "push",
    "report",
    "revert",
    "train",
    "utilization",
    "verify",
]

_HOMES = {
    "Attached": "tuning.attached",
    "Checkpoint": "checkpoint.checkpoint",
    "ExportResult": "surgery.export",
    "HealResult": "checkpoint.healing",
    "Inspection": "surgery.inspect",
    "LosslessPatch": "patch.lossless",
    "Patch": "patch.patch",
    "PatchSaving": "tuning.trainer",
    "PushResult": "hub.push",
    "RewriteResult": "surgery.rewrite",
    "Scores": "scoring.scores",
    "Selection": "selection.selection",
    "TrainResult": "training.train",
    "Utilization": "neuron_utilization.result",
    "Verification": "surgery.verify",
    "apply": "surgery.apply",
    "apply_live": "live.apply_live",
    "attach": "tuning.attached",
    "diff": "surgery.diff",
    "export_lora": "live.export_lora",
    "extract": "surgery.extract",
    "heal": "checkpoint.healing",
    "inspect": "surgery.inspect",
    "merge": "surgery.merge",
    "pull": "hub.pull",
    "push": "hub.push",
    "report": "reporting.report",
    "revert": "surgery.apply",
    "train": "training.train",
    "utilization": "neuron_utilization.utilization",
    "verify": "surgery.verify",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
