"""The vectors that a patch replaces: from the patch, if it holds them, or from its base."""

from __future__ import annotations

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, UsageError
from ..neurons.vectors import gather
from ..patch.digests import digests
from ..patch.patch import Patch, Raw

__all__ = ["BaseRows", "replaced_rows", "require_replaced"]


class BaseRows:
    """The replaced vectors, from the base checkpoint; each is checked against its digest."""

    def __init__(self, patch: Patch, base: Checkpoint) -> None:
        self._patch, self._base = patch, base

    def read(self, name: str, start: int, stop: int) -> Raw:
        """As `Patch.base_values`.

        Raises
        ------
        MismatchError
            If a vector is not the one that the patch replaces.
        """
        tensor = self._patch.tensors[name]
        rows = gather(self._base, tensor.info, tensor.layout, self._patch.index(name)[start:stop])
        if not np.array_equal(digests(rows), self._patch.base_digests(name, start, stop)):
            raise MismatchError(
                "this is not the base that the patch was made from",
                file=self._base.name,
                tensor=name,
                hint="name the right one with [[base=...]]",
            )
        return rows


def replaced_rows(patch: Patch, name: str, base: Checkpoint | None, start: int, stop: int) -> Raw:
    """The replaced vectors ``[start, stop)`` (positions in the index), checked against their digests.

    Raises
    ------
    MismatchError
        If ``base`` is given and is not the one the patch was made from.
    CorruptFileError
        If those in the patch do not match its digests.
    """
    if base is not None:
        return BaseRows(patch, base).read(name, start, stop)
    stored = patch.base_digests(name, start, stop)
    patch.check_base_rows(name, stored, start, stop)
    return patch.base_values(name, start, stop)


def require_replaced(patch: Patch, what: str) -> None:
    """Raise a `UsageError` unless the patch holds the vectors it replaced, which ``what`` needs."""
    if not patch.reversible:
        raise UsageError(
            f"{what} needs the values that the patch replaced, and the patch does not hold them",
            file=patch.place,
            hint="name the checkpoint it was made from with [[base=...]]; [[reversible=True]] makes patches "
            "that hold them",
        )
