"""Several patches of one quantized weight: whether codes of one would be read with the scales of another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import MismatchError
from ..patch.groups import RowGroup
from ..patch.overlap import Meeting, meetings
from ..patch.patch import Patch
from ..patch.patch_file import digests
from ..tensors.arrays import Int64Array


def joined_groups(patches: Sequence[Patch]) -> dict[str, RowGroup]:
    """The groups of all patches, by their codes; a `MismatchError` unless they agree."""
    found = dict[str, RowGroup]()
    for patch in patches:
        for group in patch.groups:
            if found.setdefault(group.codes, group) != group:
                raise _apart(patch, group.codes)
    owners = {name: codes for codes, group in found.items() for name in group.members.values()}
    for patch in patches:
        own = {group.codes for group in patch.groups}
        for name in patch.tensors.keys() & owners.keys():
            if owners[name] not in own:
                raise _apart(patch, name)
    return found


def require_whole_units(meeting: Meeting, patches: Sequence[Patch], group: RowGroup, role: str) -> Int64Array:
    """The rows of scales that several patches replace by different values.

    A `MismatchError` unless each of these patches has all rows of codes that need them: else, whichever wins,
    rows of one would be read with the scales of the other.
    """
    known, differing = dict[int, bytes](), set[int]()
    for n in meeting.holders if len(meeting.shared) else ():
        new = _new_digests(patches[n], meeting.name)
        differing |= {row for row, digest in new.items() if known.setdefault(row, digest) != digest}
    rows = np.array(sorted(differing), np.int64)
    for n in meeting.holders:
        _require_whole(patches[n], group, role, rows)
    return rows


def require_units_in_turn(patches: Sequence[Patch]) -> None:
    """As `require_whole_units`, for patches that are applied one after the other: for the later ones."""
    groups = joined_groups(patches) if len(patches) > 1 else {}
    owners = {name: (group, role) for group in groups.values() for role, name in group.companions.items()}
    for meeting in meetings(patches, owners):
        known = dict[int, bytes]()
        for n in meeting.holders if len(meeting.shared) else ():
            new = _new_digests(patches[n], meeting.name)
            rows = [row for row, digest in new.items() if known.get(row, digest) != digest]
            _require_whole(patches[n], *owners[meeting.name], np.array(rows, np.int64))
            known |= new


def _new_digests(patch: Patch, name: str) -> dict[int, bytes]:
    """By row of a small tensor the digest of its new value."""
    found = map(bytes, digests(patch.values(name)))
    return dict(zip(patch.index(name).tolist(), found, strict=True))


def _require_whole(patch: Patch, group: RowGroup, role: str, rows: Int64Array) -> None:
    if not len(rows):
        return
    name = group.members[role]
    codes = patch.tensors[group.codes].layout
    every = np.arange(codes.count, dtype=np.int64)
    needed = group.needed(role, every, codes, patch.tensors[name].layout.count)
    mine = np.intersect1d(rows, patch.index(name), assume_unique=True)
    if not np.isin(every[np.isin(needed, mine)], patch.index(group.codes), assume_unique=True).all():
        raise MismatchError(
            f"{patch.name} keeps {role} that another patch changes, and not all rows that share them",
            tensor=name,
            expected=f"equal {role}, or all rows that share them in each patch",
            found=f"{role} of {len(mine)} rows that differ",
            hint="merge the checkpoints before they are quantized",
        )


def _apart(patch: Patch, name: str) -> MismatchError:
    return MismatchError(
        "the patches take these codes with other scales, or without any", file=patch.place, tensor=name
    )
