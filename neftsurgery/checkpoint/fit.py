"""The same base? Does it fit? Asked of checkpoints, scores, selections and patches, and answered here."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike

from ..errors import MismatchError
from ..tensors.header import TensorInfo
from .provenance import Provenance
from .side import Side

__all__ = ["require_same_files", "require_tensors", "same_files", "same_tensor"]


def same_tensor(a: TensorInfo | None, b: TensorInfo | None) -> bool:
    """Whether both are there, with the same shape and dtype."""
    return a is not None and b is not None and (a.dtype, a.shape) == (b.dtype, b.shape)


def require_tensors(
    checkpoint: Side, tensors: Iterable[TensorInfo], what: str, made_from: Provenance | None = None
) -> None:
    """Raise a `MismatchError` unless the checkpoint has all ``tensors``, with their shapes and dtypes.

    For the message: ``what`` they belong to, and the checkpoint that this was made from.
    """
    for info in tensors:
        found = checkpoint.tensors.get(info.name)
        if not same_tensor(info, found):
            label = None if made_from is None else made_from.label
            raise MismatchError(
                f"{what} is not for this checkpoint",
                file=checkpoint.name,
                tensor=info.name,
                expected=info.describe(),
                found=found.describe() if found else "no such tensor",
                hint=None if label is None else f"it was made from {label}",
            )


def same_files(one: Provenance, other: Provenance) -> bool | None:
    """Whether both have the same fingerprint; None if one has none."""
    a, b = one.get("fingerprint"), other.get("fingerprint")
    return None if a is None or b is None else a == b


def require_same_files(
    what: str,
    expected: Provenance,
    found: Provenance,
    *,
    file: str | PathLike[str] | None = None,
    hint: str | None = None,
) -> None:
    """Raise a `MismatchError` that says ``what`` if the two have different fingerprints."""
    if same_files(expected, found) is False:
        raise MismatchError(
            what,
            file=file,
            expected=f"fingerprint {expected['fingerprint']}",
            found=found["fingerprint"],
            hint=hint,
        )
