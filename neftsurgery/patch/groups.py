"""Tensors of a patch that mean something only together: the codes of a quantized weight, and their scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CorruptFileError
from ..neurons.layout import Layout
from ..quantization.weight import shared_rows
from ..tensors.arrays import Int64Array, Mask
from ..tensors.document import bad
from ..tensors.reader import TensorFile
from ..version import UPDATE

if TYPE_CHECKING:
    from .patch import PatchTensor


_WHAT = "neuron patch"
#: The layouts that are known; all have the same rule of which rows go together.
_LAYOUTS = ("fp8", "mxfp4", "int8", "packed-int")


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The tensors of one quantized weight.

    A neuron of a member serves ``shares[role]`` neighbouring neurons of the codes, of one matrix; one that is
    the only one of its tensor serves all.
    """

    layout: str
    members: Mapping[str, str]  # tensors by role, ``codes`` among them
    shares: Mapping[str, int]  # by role, but for the codes

    @property
    def codes(self) -> str:
        """The tensor of codes, whose neurons are those of the weight."""
        return self.members["codes"]

    @property
    def companions(self) -> dict[str, str]:
        """The other members, by role."""
        return {role: name for role, name in self.members.items() if role != "codes"}

    def needed(self, role: str, rows: Int64Array, codes: Layout, count: int) -> Int64Array:
        """Which of the ``count`` neurons of a member each of ``rows`` of the codes needs."""
        inner = codes.shape[codes.axes[-1]] if codes.axes else 1
        return shared_rows(rows, inner, self.shares[role], count)

    def is_whole(self, role: str, new: Int64Array, rows: Int64Array, codes: Layout, count: int) -> bool:
        """Whether ``rows`` of codes are all that need ``new`` ones of the ``count`` neurons of a member."""
        every = np.arange(codes.count, dtype=np.int64)
        wanted = every[np.isin(self.needed(role, every, codes, count), new)]
        return bool(np.isin(wanted, rows, assume_unique=True).all())

    def fault(
        self,
        tensors: Mapping[str, PatchTensor],
        index: Callable[[str], Int64Array],
        changed: Callable[[str], Mask],
    ) -> str | None:
        """Why the rows of its members do not go together; None if they do.

        ``changed``: of a member, which of its rows in the patch are new.
        """
        codes, rows = tensors[self.codes].layout, index(self.codes)
        last = np.arange(codes.count, dtype=np.int64)[-1:]
        for role, name in self.companions.items():
            count = tensors[name].layout.count
            if count not in (1, int(self.needed(role, last, codes, 0).max(initial=-1)) + 1):
                return f"its {role} are not those of its codes"
            if not np.array_equal(np.unique(self.needed(role, rows, codes, count)), index(name)):
                return f"its {role} do not go with the rows of its codes"
            new = index(name)[changed(name)] if count < codes.count else index(name)[:0]
            if len(new) and not self.is_whole(role, new, rows, codes, count):
                return f"its {role} change without all rows of codes that need them"
        return None


def read_groups(
    file: TensorFile, manifest: Mapping[str, object], tensors: Mapping[str, PatchTensor]
) -> list[RowGroup]:
    """The groups of a patch; a `CorruptFileError` if they make no sense, or are of an unknown layout."""
    groups = manifest.get("groups", [])
    if not isinstance(groups, list):
        raise bad(file, _WHAT, "its groups are not a list")
    taken = set[str]()
    found = []
    for group in groups:
        entry = group if isinstance(group, dict) else {}
        layout, members, shares = (entry.get(key) for key in ("layout", "members", "shares"))
        if not isinstance(layout, str) or not isinstance(members, dict):
            raise bad(file, _WHAT, "a group has no layout or members")
        for name in members.values():
            if not isinstance(name, str) or name not in tensors or name in taken:
                raise bad(file, _WHAT, "a group has a member that is not a tensor of the patch, or is in two")
            taken.add(name)
        if layout not in _LAYOUTS:
            raise CorruptFileError(
                f"the patch has a group of a layout that this version does not know: {layout[:100]!r}",
                file=file.path,
                tensor=next(iter(members.values()), None),
                hint=UPDATE,
            )
        roles = members.keys() - {"codes"}
        if "codes" not in members or not isinstance(shares, dict) or shares.keys() != roles:
            raise bad(file, _WHAT, "a group does not say which rows share its members")
        if not all(type(share) is int and 0 < share < 1 << 62 for share in shares.values()):
            raise bad(file, _WHAT, "a group has shares that are not counts of rows")
        found.append(RowGroup(layout, members, shares))
    return found
