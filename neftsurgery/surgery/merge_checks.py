"""What must hold before patches are merged, and what the result will be.

Of several patches of one quantized weight also: codes of one must not be read with the scales of another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance, require_same_files, same_tensor
from ..errors import MismatchError, UsageError
from ..patch.groups import RowGroup
from ..patch.merging import ARITHMETIC, DENSITY, POLICIES
from ..patch.overlap import Meeting, meetings
from ..patch.patch import Manifest, Patch
from ..patch.patch_file import digests
from ..patch.write import NewPatch
from ..progress import Progress
from ..selection.selection import Chosen, Selection, SelectionFacts
from ..tensors.arrays import Int64Array
from ..tensors.floats import FLOATS
from .verb import require_replaced


def check_patches(patches: Sequence[Patch], progress: Progress) -> None:
    """Raise a `CorruptFileError` unless each patch's hashes match its content: a merge gets new hashes."""
    with progress("checking", sum(patch.value_bytes for patch in patches)) as advance:
        for patch in patches:
            patch.check()
            advance(patch.value_bytes)


@dataclass(frozen=True, slots=True)
class OverlapRule:
    """What is done with neurons that several patches replace. Made by `of`."""

    name: str  # one of POLICIES
    weights: tuple[float, ...]  # one per patch
    density: float = DENSITY  # for ties

    @classmethod
    def of(
        cls,
        patches: int,
        on_overlap: str = "error",
        weights: Sequence[float] | None = None,
        density: float | None = None,
    ) -> OverlapRule:
        """Check the options for so many patches; raises a `UsageError`."""
        if not patches:
            raise UsageError("there is no patch to merge")
        if on_overlap not in POLICIES:
            raise UsageError(
                f"there is no rule {on_overlap!r} for neurons that several patches replace",
                hint=f"known ones: {', '.join(POLICIES)}",
            )
        if weights is not None and on_overlap not in ARITHMETIC:
            raise UsageError(f"weights do not go with {on_overlap}", hint="they are for mean, sum and ties")
        if density is not None and on_overlap != "ties":
            raise UsageError(f"a density does not go with {on_overlap}", hint="it is for ties")
        if density is not None and not 0 < density <= 1:
            raise UsageError("the density must be above 0 and at most 1", found=density)
        given = tuple(float(weight) for weight in weights) if weights is not None else (1.0,) * patches
        if len(given) != patches:
            raise UsageError("expected one weight per patch", expected=patches, found=len(given))
        if not all(math.isfinite(weight) and (weight > 0 or on_overlap == "sum") for weight in given):
            what = "finite numbers" if on_overlap == "sum" else "finite and above 0"
            raise UsageError(f"weights must be {what}", found=", ".join(f"{weight:g}" for weight in given))
        return cls(on_overlap, given, DENSITY if density is None else density)

    @property
    def needs_base(self) -> bool:
        """Whether it computes with differences from the base."""
        return self.name in ("sum", "ties")

    def describe(self) -> dict[str, object]:
        """For the manifest."""
        facts: dict[str, object] = {"on_overlap": self.name}
        if self.name in ARITHMETIC:
            facts["weights"] = list(self.weights)
        return facts | ({"density": self.density} if self.name == "ties" else {})


def refuse_other_options(chain: bool, overlap: Mapping[str, object], coding: Mapping[str, object]) -> None:
    """Raise a `UsageError` for an option of the other kind of merge: of neurons, or of a chain."""
    for name, value in (overlap if chain else coding).items():
        if value not in (None, "error"):
            raise UsageError(f"[[{name}]] {'does not go with' if chain else 'goes only with'} [[chain]]")


def plan_union(
    patches: Sequence[Patch], rule: OverlapRule, base: Checkpoint | None, reversible: bool
) -> tuple[dict[str, Meeting], NewPatch, list[str]]:
    """By tensor who replaces what, the patch that becomes of it, and warnings; raises as `merge`."""
    warnings = _check_origins(patches, checked=base is not None)
    tensors = _check_tensors(patches)
    groups = joined_groups(patches)
    companions = {name: (one, role) for one in groups.values() for role, name in one.companions.items()}
    grouped = companions.keys() | groups.keys()
    found: dict[str, Meeting] = {}
    chosen: dict[str, Chosen] = {}
    for meeting in meetings(patches):
        if meeting.name in companions:  # rows that are equal do not overlap
            differing = require_whole_units(meeting, patches, *companions[meeting.name])
            _check_meeting(replace(meeting, shared=differing), patches, rule, True)
        else:
            _check_meeting(meeting, patches, rule, meeting.name in grouped)
        if len(meeting.union):
            owner = tensors[meeting.name].tensors[meeting.name]
            found[meeting.name] = meeting
            chosen[meeting.name] = Chosen(owner.info, owner.layout, meeting.union)
    if not chosen:
        raise MismatchError("the patches replace no neuron", file=patches[0].place)
    if base is None:
        _check_replaced(patches, rule, found, reversible)
    manifest = _manifest(patches, rule, base)
    selection = Selection(chosen, manifest.selection)
    return found, NewPatch(selection, manifest, reversible, [*groups.values()]), warnings


def _called(patches: Sequence[Patch], number: int) -> str:
    place = patches[number].place
    return str(place) if place is not None else f"patch {number + 1}"


def _check_origins(patches: Sequence[Patch], *, checked: bool) -> list[str]:
    """Refuse patches that say that they were made from different files."""
    known = [n for n, patch in enumerate(patches) if patch.base.get("fingerprint") is not None]
    for n in known[1:]:
        what = f"{_called(patches, known[0])} and {_called(patches, n)} were made from different bases"
        hint = "patches merge only where they replace neurons of the same base"
        require_same_files(what, patches[known[0]].base, patches[n].base, hint=hint)
    if len(patches) == 1 or len(known) == len(patches) or checked:
        return []
    names = ", ".join(_called(patches, n) for n in range(len(patches)) if n not in known)
    return [f"which base {names} was made from is not known: only the neurons in common were compared"]


def _check_tensors(patches: Sequence[Patch]) -> dict[str, Patch]:
    """By tensor the first patch that touches it; the others fit it."""
    first: dict[str, int] = {}
    for n, patch in enumerate(patches):
        for name, tensor in patch.tensors.items():
            owner = patches[first.setdefault(name, n)].tensors[name]
            what = f"{_called(patches, first[name])} and {_called(patches, n)}"
            if not same_tensor(owner.info, tensor.info):
                raise MismatchError(
                    f"{what} are for different models",
                    tensor=name,
                    expected=owner.info.describe(),
                    found=tensor.info.describe(),
                )
            if owner.layout.axes != tensor.layout.axes:
                raise MismatchError(
                    f"{what} cut this tensor along different axes: every row crosses every column, "
                    "and a patch says only one kind of neuron of a tensor",
                    tensor=name,
                    expected=f"neuron axes {list(owner.layout.axes)}",
                    found=list(tensor.layout.axes),
                    hint="apply them one after the other: `neftsurgery apply BASE P Q -o OUT`",
                )
    return {name: patches[n] for name, n in first.items()}


def _check_meeting(meeting: Meeting, patches: Sequence[Patch], rule: OverlapRule, grouped: bool) -> None:
    if len(meeting.foreign):
        for n in meeting.holders:
            patches[n].check()  # a damaged digest looks like another base
        raise MismatchError(
            f"{_two(meeting, patches, meeting.foreign[0])} were made from different bases",
            tensor=meeting.name,
            expected="neurons in common that were the same in the base",
            found=f"{len(meeting.foreign)} of {len(meeting.shared)} that were not, "
            f"the first is {meeting.foreign[0]}",
        )
    if rule.name == "error" and len(meeting.shared):
        raise MismatchError(
            f"{_two(meeting, patches, meeting.shared[0])} overlap",
            tensor=meeting.name,
            expected="no neuron in common",
            found=f"{len(meeting.shared)}, the first is {meeting.shared[0]}",
            hint="choose what becomes of them with [[on_overlap]]: first, last, mean, sum or ties",
        )
    dtype = patches[meeting.holders[0]].tensors[meeting.name].info.dtype
    if (
        rule.name in ARITHMETIC
        and len(_computed(meeting, patches, rule))
        and (grouped or dtype not in FLOATS)
    ):
        what = "codes of quantized weights" if grouped else f"{dtype} elements"
        raise MismatchError(
            f"{what} are not numbers: there is no {rule.name} of them",
            tensor=meeting.name,
            hint="choose [[on_overlap=first]] or [[on_overlap=last]]",
        )


def _two(meeting: Meeting, patches: Sequence[Patch], neuron: int) -> str:
    """The patches that replace a neuron, the first two of them."""
    holders = [n for n in meeting.holders if neuron in patches[n].index(meeting.name)]
    return " and ".join(_called(patches, n) for n in holders[:2])


def _computed(meeting: Meeting, patches: Sequence[Patch], rule: OverlapRule) -> Int64Array:
    """The neurons that are computed with, ascending."""
    if rule.name != "sum":
        return meeting.shared
    scaled = [patches[n].index(meeting.name) for n in meeting.holders if rule.weights[n] != 1]
    return np.unique(np.concatenate([meeting.shared, *scaled]))


def _check_replaced(
    patches: Sequence[Patch], rule: OverlapRule, found: Mapping[str, Meeting], reversible: bool
) -> None:
    """Refuse a merge that needs replaced values which no patch holds."""
    if not (reversible or rule.needs_base):
        return
    what = "a reversible patch" if reversible else f"[[on_overlap={rule.name}]]"
    for name, meeting in found.items():
        needed = meeting.union if reversible else _computed(meeting, patches, rule)
        for n in meeting.holders:
            if patches[n].tensors[name].reversible:
                needed = np.setdiff1d(needed, patches[n].index(name), assume_unique=True)
        for n in meeting.holders:
            if len(np.intersect1d(needed, patches[n].index(name), assume_unique=True)):
                require_replaced(patches[n], what)


def _manifest(patches: Sequence[Patch], rule: OverlapRule, base: Checkpoint | None) -> Manifest:
    """What the result says of itself."""
    if len(patches) == 1 and rule.weights == (1.0,):  # the patch itself
        return Manifest(patches[0].manifest)
    origin = next((patch.base for patch in patches if patch.base.get("fingerprint")), None)
    if origin is None:
        origin = patches[0].base if base is None else Provenance.of(base)
    same = {
        key: value
        for key, value in patches[0].facts.items()
        if key in ("anatomy", "score") and all(patch.facts.get(key) == value for patch in patches)
    }
    merged = [{**_origin(patch), "neurons": patch.neurons} for patch in patches]
    how = same | {"merged": {**rule.describe(), "patches": merged}}
    # A bias goes along with its neurons unless some patch chose it for itself.
    biases = {name for patch in patches for name in patch.facts.companion_biases & patch.tensors.keys()}
    biases -= {name for patch in patches for name in patch.tensors.keys() - patch.facts.companion_biases}
    how |= {"followers": sorted(biases)} if biases else {}
    return Manifest.of(origin, SelectionFacts(how))


def _origin(patch: Patch) -> dict[str, object]:
    """What the merged patch calls one of its parts: no paths, which mean nothing elsewhere."""
    source = patch.source
    if source is not None and source.repo is not None:
        return {"name": source.repo, "revision": source.revision}
    return {"name": None if patch.path is None else patch.path.name}


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
    codes, count = patch.tensors[group.codes].layout, patch.tensors[name].layout.count
    mine = np.intersect1d(rows, patch.index(name), assume_unique=True)
    if not group.is_whole(role, mine, patch.index(group.codes), codes, count):
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
