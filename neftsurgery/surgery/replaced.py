"""The vectors that a patch replaces: from the patch if it holds them, else from its base."""

from __future__ import annotations

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, UsageError
from ..neurons.vectors import gather
from ..patch.digests import digests
from ..patch.patch import Patch
from ..tensors.arrays import RawBytes

__all__ = ["replaced_rows", "require_replaced"]


def replaced_rows(patch: Patch, base: Checkpoint | None, name: str, start: int, stop: int) -> RawBytes:
    """The replaced vectors ``[start, stop)`` (positions in the index), checked against their digests.

    Raises
    ------
    MismatchError
        If ``base`` is given and is not the one the patch was made from.
    CorruptFileError
        If those in the patch do not match its digests.
    """
    stored = patch.base_digests(name, start, stop)
    if base is None:
        patch.check_base_rows(name, stored, start, stop)
        return patch.base_values(name, start, stop)
    tensor = patch.tensors[name]
    rows = gather(base, tensor.info, tensor.layout, patch.index(name)[start:stop])
    if not np.array_equal(digests(rows), stored):
        raise MismatchError(
            "this is not the base that the patch was made from",
            file=base.name,
            tensor=name,
            hint="name the right one with [[base=...]]",
        )
    return rows


def require_replaced(patch: Patch, what: str) -> None:
    """Raise a `UsageError` unless the patch holds the vectors it replaced, which ``what`` needs."""
    if not patch.reversible:
        raise UsageError(
            f"{what} needs the values that the patch replaced, and the patch does not hold them",
            file=patch.place,
            hint="name the checkpoint it was made from with [[base=...]]; [[reversible=True]] makes patches "
            "that hold them",
        )
