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

if TYPE_CHECKING:  # ``as`` tells type checkers that a name is public
    from .checkpoint.checkpoint import Checkpoint as Checkpoint
    from .checkpoint.healing import HealResult as HealResult
    from .checkpoint.healing import heal as heal
    from .hub.pull import pull as pull
    from .hub.push import PushResult as PushResult
    from .hub.push import push as push
    from .live.apply_live import apply_live as apply_live
    from .live.export_lora import export_lora as export_lora
    from .neuron_utilization.result import Utilization as Utilization
    from .neuron_utilization.utilization import utilization as utilization
    from .patch.lossless import LosslessPatch as LosslessPatch
    from .patch.patch import Patch as Patch
    from .reporting.report import report as report
    from .scoring.scores import Scores as Scores
    from .selection.selection import Selection as Selection
    from .surgery.apply import apply as apply
    from .surgery.apply import revert as revert
    from .surgery.diff import diff as diff
    from .surgery.export import ExportResult as ExportResult
    from .surgery.extract import extract as extract
    from .surgery.inspect import Inspection as Inspection
    from .surgery.inspect import inspect as inspect
    from .surgery.merge import merge as merge
    from .surgery.rewrite import RewriteResult as RewriteResult
    from .surgery.verify import Verification as Verification
    from .surgery.verify import verify as verify
    from .training.train import TrainResult as TrainResult
    from .training.train import train as train
    from .tuning.attached import Attached as Attached
    from .tuning.attached import attach as attach
    from .tuning.trainer import PatchSaving as PatchSaving

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

__all__ = ["CorruptFileError", "MachineError", "MismatchError", "NeftError", "UsageError", "__version__"]
__all__ += _HOMES


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
