"""verify: is a checkpoint in the state before a patch, after it, or in neither?"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from ..checkpoint.opening import open_checkpoint
from ..errors import boundary
from ..patch.patch import Patch
from ..progress import Progress, Timing, silent
from ..storage.threads import Limits
from .state import PatchState, State, TensorState, examine

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes
    ----------
    state:
        Of all touched tensors together: ``base``, ``patched``, ``mixed`` or ``neither``. Where the
        patch changes no bit, both ``base`` and ``patched`` hold, and it says ``patched``.
    tensors:
        Per touched tensor, how many vectors are in which state; its ``state`` sums that up.
    """

    state: State
    tensors: dict[str, TensorState]
    timing: Timing = field(default_factory=Timing)

    def holds(self, expected: str | None = None) -> bool:
        """Whether all vectors are as in the base, or all as patched; or as ``expected``."""
        if expected is None:
            return self.state in ("base", "patched")
        wrong = "patched" if expected == "base" else "base"
        return not any(tensor.neither or getattr(tensor, wrong) for tensor in self.tensors.values())


@boundary
def verify(
    checkpoint: str | os.PathLike[str],
    patch: Patch | str | os.PathLike[str],
    *,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> Verification:
    """Compare every vector that a patch touches with its state before and after.

    Parameters
    ----------
    checkpoint, patch:
        A checkpoint, and a patch or its path.
    threads, memory:
        As in `diff`.

    Raises
    ------
    MismatchError
        If a tensor is missing, or of another shape or dtype.
    CorruptFileError
        If the patch does not match its own hashes, or a file is damaged.
    """
    timing = Timing()
    opened = open_checkpoint(checkpoint)
    loaded = patch if isinstance(patch, Patch) else Patch.load(patch)
    with timing.clock(), progress("checking", loaded.value_bytes) as advance:
        found: PatchState = examine(opened, [loaded], limits=Limits.of(threads, memory), progress=advance)[0]
        opened.check_unchanged()
        loaded.check_unchanged()
    timing.bytes_read = opened.bytes_read
    return Verification(found.state, found.tensors, timing)
