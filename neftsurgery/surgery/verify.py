"""verify: whether a checkpoint is in the state before a patch, after it, or in neither."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Unpack

from ..checkpoint.checkpoint import Checkpoint
from ..errors import boundary
from ..options import RunOptions, split
from ..patch.patch import Patch
from ..progress import Progress, Stopwatch, Timing, silent
from ..storage.threads import Limits
from ..text import plural
from .state import State, TensorState, examine
from .verb import running

__all__ = ["Verification", "VerifyPlan", "plan_verify", "verify"]


@dataclass(frozen=True, repr=False)
class Verification:
    """What `verify` found.

    Attributes
    ----------
    state:
        Of all touched tensors together: ``base``, ``patched``, ``mixed`` or ``neither``. If the patch changes
        no bit, both ``base`` and ``patched`` hold, and the state is ``patched``.
    tensors:
        How many vectors are in which state, by touched tensor.
    """

    state: State
    tensors: dict[str, TensorState]
    timing: Timing = field(default_factory=Timing)

    @property
    def neurons(self) -> int:
        """How many vectors were compared."""
        return sum(t.base + t.patched + t.both + t.neither for t in self.tensors.values())

    def __str__(self) -> str:
        return f"{self.state}: {plural(self.neurons, 'neuron')} in {plural(len(self.tensors), 'tensor')}"

    def __repr__(self) -> str:
        return f"<Verification {self}>"

    def holds(self, expected: str | None = None) -> bool:
        """Whether all vectors are in the state ``expected``; None: all in the base, or all patched."""
        if expected is None:
            return self.state in ("base", "patched")
        wrong = "patched" if expected == "base" else "base"
        return not any(tensor.neither or getattr(tensor, wrong) for tensor in self.tensors.values())


@dataclass(frozen=True)
class VerifyPlan:
    """A checkpoint, and a patch that fits it. Made by `plan_verify`."""

    checkpoint: Checkpoint
    patch: Patch

    def describe(self) -> dict[str, object]:
        """For JSON."""
        return {
            "checkpoint": self.checkpoint.name,
            "patch": self.patch.name,
            "neurons": self.patch.neurons,
            "tensors": list(self.patch.tensors),
        }

    def run(self, *, limits: Limits | None = None, progress: Progress = silent) -> Verification:
        """Compare every vector that the patch touches."""
        watch = Stopwatch()
        with watch.running(), progress("checking", self.patch.value_bytes) as advance:
            (found,) = examine(self.checkpoint, [self.patch], limits=limits or Limits.of(), advance=advance)
            self.checkpoint.check_unchanged()
            self.patch.check_unchanged()
        watch.bytes_read = self.checkpoint.bytes_read
        return Verification(found.state, found.tensors, watch.timing)


@boundary
def verify(
    checkpoint: str | os.PathLike[str],
    patch: Patch | str | os.PathLike[str],
    **options: Unpack[RunOptions],
) -> Verification:
    """Compare every vector that a patch touches with its state before and after.

    Parameters
    ----------
    checkpoint, patch:
        A checkpoint, and a patch or its path.
    threads, memory, progress:
        As in `diff`.

    Raises
    ------
    MismatchError
        If a tensor is missing, or of another shape or dtype.
    CorruptFileError
        If the patch does not match its own hashes, or a file is damaged.
    """
    (run,) = split("verify", options, RunOptions)
    limits, progress = running(run)
    return plan_verify(checkpoint, patch).run(limits=limits, progress=progress)


def plan_verify(checkpoint: str | os.PathLike[str], patch: Patch | str | os.PathLike[str]) -> VerifyPlan:
    """Read the headers of both and check that they fit each other."""
    opened = Checkpoint.open(checkpoint)
    loaded = patch if isinstance(patch, Patch) else Patch.load(patch)
    loaded.require_fit(opened)
    return VerifyPlan(opened, loaded)
