"""The commands of the demo with training, in a module of their own so that a dry run needs no torch."""

from __future__ import annotations

__all__ = ["APPLY", "CONTROL", "DIFF", "LINES", "REPORT", "REVERT", "SELECT", "SHARE", "VERIFY"]

SHARE = "9%"
DIFF = "diff base tuned -o scores.safetensors"
SELECT = f"select scores.safetensors --neurons {SHARE} -o selection.safetensors"
CONTROL = f"select scores.safetensors --neurons {SHARE} --policy random -o control.safetensors"
APPLY = "apply base neuron_patch.safetensors -o patched"
VERIFY = "verify patched neuron_patch.safetensors --expect patched"
REVERT = "revert patched neuron_patch.safetensors --base base -o restored"
REPORT = f"report scores.safetensors control_patch.safetensors --neurons {SHARE} -o report.html"
LINES = tuple(f"neftsurgery {line}" for line in (DIFF, SELECT, CONTROL, APPLY, VERIFY, REVERT, REPORT))
