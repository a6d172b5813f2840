"""Two checkpoints side by side: what they have in common, what is scored of it, what is not and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from llvmlite.binding import get_host_cpu_name

from ..checkpoint.adapter import AdaptedWeights, open_pair
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.dequantized import coded_sides, comparable, dequantized, in_common_numbers
from ..checkpoint.folder_files import file_notes, not_compared
from ..checkpoint.name_prefixes import NO_CHANGE, Prefixes, fitting_prefixes
from ..checkpoint.provenance import same_tensor, why_unlike
from ..checkpoint.ties import Joined, join
from ..errors import MismatchError, UsageError
from ..neurons.anatomy import Anatomy, read_anatomy
from ..neurons.layout import Layout
from ..neurons.tensor_names import matching
from ..options import Scope
from ..scoring.engine import Engine, TensorResult, stream
from ..scoring.partial_sums import CUT_SIZES, Job
from ..storage.output_checks import AnyPath
from ..storage.threads import Limits, Seen
from ..tensors.header import TensorInfo
from ..tensors.reader import WeightReader
from ..text import natural_key, plural
from ..version import __version__

_LONGEST_ROW = 1 << 20  # of codes: scoring reads whole rows of them


@dataclass(frozen=True)
class Pair:
    """A base and a tuned checkpoint, planned: no weight is read yet."""

    base: Checkpoint
    joined: Joined  # with the tuned model
    anatomy: Anatomy  # of the tensors in common, each once
    differing: Mapping[str, tuple[str, str]]  # of another shape or dtype: both descriptions
    scope: Scope

    @property
    def tuned(self) -> Checkpoint:
        """The tuned model, under the names of the base."""
        return self.joined.tuned

    @cached_property
    def not_compared(self) -> list[str]:
        """What may belong to the two and was not compared: files, and tensors that no file has."""
        return not_compared(self.base, self.tuned)

    @cached_property
    def warnings(self) -> list[str]:
        """Sentences for the user."""
        notes = [*self.joined.notes, *file_notes(self.base), *file_notes(self.tuned)]
        if self.differing and (why := why_unlike(self.base, self.tuned)):
            notes.append(why)
        stored, scored = self.base.quantized, self.anatomy.scored
        axes = {tensor.info.name: tensor.layout.axes for tensor in scored if tensor.info.name in stored}
        if across := [name for name, mine in axes.items() if mine != stored[name].row_axes]:
            notes.append(
                f"neurons of {plural(len(across), 'quantized weight')} lie across rows of codes (first: "
                f"{across[0]}): they are scored, and cannot be cut out"
            )
        return [*self.anatomy.warnings, *dict.fromkeys(notes)]

    @property
    def parameters(self) -> int:
        """Of the base; a tied tensor counts once."""
        return self.base.parameters - sum(self.base.tensors[name].elements for name in self.joined.copies)

    @cached_property
    def companion_biases(self) -> dict[str, tuple[int, ...]]:
        """Biases and included tensors of one-element neurons: their changes are recorded. With their axes."""
        biases = {tensor.bias for tensor in self.anatomy.scored if tensor.bias is not None}
        return {
            entry.info.name: entry.axes
            for entry in self.anatomy.listed
            if entry.axes is not None
            and (entry.included or entry.info.name in biases)
            and Layout.of(entry.info.shape, entry.axes).width == 1
        }

    @cached_property
    def jobs(self) -> list[Job]:
        """All common tensors, in reading order; under ``units`` layer by layer."""
        jobs = {tensor.info.name: Job(tensor.info, tensor.layout) for tensor in self.anatomy.scored}
        for entry in self.anatomy.listed:
            axes = self.companion_biases.get(entry.info.name)
            layout = None if axes is None else Layout.of(entry.info.shape, axes)
            jobs[entry.info.name] = Job(entry.info, layout)
        names = sorted(jobs, key=self.base.position)
        if self.anatomy.unit_count:
            layers = {tensor.info.name: tensor.layer for tensor in self.anatomy.scored}
            order = dict.fromkeys(layers[name] for name in names if name in layers)
            stages = {layer: number for number, layer in enumerate(order)}
            names.sort(key=lambda name: stages[layers[name]] if name in layers else len(stages))
        return [jobs[name] for name in names]

    @cached_property
    def compared(self) -> tuple[WeightReader, WeightReader, list[Job]]:
        """The two sides and the jobs as they are scored: of adapted and quantized weights, the numbers."""
        if isinstance(self.tuned, AdaptedWeights):
            base, tuned = self.tuned.in_float32()
            return base, tuned, [Job(base.tensors[job.info.name], job.layout) for job in self.jobs]
        first, second, straight = in_common_numbers(self.base, self.tuned, [j.info.name for j in self.jobs])
        if first is self.base:
            return first, second, self.jobs
        shown = [_shown(job, first.tensors[job.info.name], straight) for job in self.jobs]
        return first, second, [self._with_codes(job) for job in shown]

    @property
    def seen(self) -> Seen:
        """What other processes must see alike for equal bits."""
        processor = os.environ.get("NUMBA_CPU_NAME") or get_host_cpu_name()  # wider vectors round otherwise
        return (*self.base.seen, *self.tuned.seen, ("neftsurgery", __version__, processor))

    def results(self, limits: Limits, progress: Callable[[int], None]) -> Iterator[TensorResult]:
        """Compare the two: as `stream`, by the executor of ``limits`` if it has one."""
        sides, prefixes = (self.base.source, self.tuned.source), self.tuned.prefixes or NO_CHANGE
        again = partial(_again, sides[0].address, sides[1].address, prefixes, self.scope)
        dispatch = limits.dispatch(again, self.seen, self.nbytes // 2)
        in_any_order = not self.anatomy.unit_count  # the sums of units depend on the order of their tensors
        return stream(
            *self.compared, limits=limits, progress=progress, stacked=in_any_order, dispatch=dispatch
        )

    def _with_codes(self, job: Job) -> Job:
        """The job with the codes that its sums follow from, if both sides have them and neurons are rows."""
        info, codes = job.info, coded_sides(self.base, self.tuned, job.info.name)
        rows = job.layout is not None and job.layout.axes == tuple(range(len(info.shape) - 1))
        if codes is None or not rows or info.shape[-1] > _LONGEST_ROW:
            return job
        return Job(replace(info, dtype=codes[0].weight.code_type), job.layout, codes)

    @cached_property
    def nbytes(self) -> int:
        """Bytes that comparing them reads."""
        sides = (self.base, self.tuned)
        return sum(side.stored_bytes(job.info.name) for job in self.jobs for side in sides)

    def describe(self) -> dict[str, object]:
        """For JSON: what does not match."""
        return {
            "only_in_base": list(self.joined.only_base),
            "only_in_tuned": list(self.joined.only_tuned),
            "differing": {name: {"base": a, "tuned": b} for name, (a, b) in self.differing.items()},
        }


def open_sides(
    base: AnyPath, tuned: AnyPath, prefixes: Prefixes = NO_CHANGE
) -> tuple[Checkpoint, Checkpoint]:
    """Open a base and what was tuned from it, whose tensor names are changed by ``prefixes``.

    Raises a `MismatchError` if the two have names in common only outside their layers, or if other prefixes
    would give them more names in common.
    """
    first, second = open_pair(base, tuned)
    if prefixes and isinstance(second, AdaptedWeights):
        raise UsageError(f"{prefixes} does not go with an adapter", file=tuned, hint="name its own base")
    given = second.tensors
    if prefixes:
        second = second.renamed(prefixes, first.tensors)
    if not isinstance(second, AdaptedWeights):
        first, second = dequantized(first), dequantized(second)
    _refuse_other_names(first, second, given, prefixes)
    return first, second


def pair(base: Checkpoint, tuned: Checkpoint, scope: Scope) -> Pair:
    """Plan the comparison of two checkpoints; if nothing of them can be scored, a `MismatchError`."""
    joined = join(base, tuned)
    tuned = joined.tuned
    common = {
        name: info
        for name, info in base.tensors.items()
        if name not in joined.copies
        and name in tuned.tensors
        and (same_tensor(info, tuned.tensors[name]) or comparable(base, tuned, name))
    }
    if not common:
        raise _nothing_common(base, tuned)
    shared = base.tensors.keys() & tuned.tensors.keys()
    both = sorted(shared - common.keys() - joined.copies.keys(), key=natural_key)
    differing = {name: (base.tensors[name].describe(), tuned.tensors[name].describe()) for name in both}
    named = _under_one_name(scope, common, joined.copies)
    _refuse_unequal(named, common, differing, {base.name: joined.only_base, tuned.name: joined.only_tuned})
    anatomy = read_anatomy(named, common, base.config)
    if not anatomy.scored and not any(entry.included and entry.axes for entry in anatomy.listed):
        raise _nothing_scored(base, tuned, anatomy)
    return Pair(base, joined, anatomy, differing, scope)


def _again(base: str, tuned: str, prefixes: Prefixes, scope: Scope) -> tuple[Callable[[Any], Any], Seen]:
    """What compares the two in another process, and the files that it sees."""
    found = pair(*open_sides(base, tuned, prefixes), scope)
    return Engine(*found.compared, Limits.of(1), CUT_SIZES).run, found.seen


def _shown(job: Job, info: TensorInfo, straight: Collection[str]) -> Job:
    """A job as it is scored; of weights whose last two axes are swapped, neurons keep their order."""
    axes = job.layout.axes if job.layout is not None else ()
    if info.name in straight:
        swapped = {len(info.shape) - 1: len(info.shape) - 2, len(info.shape) - 2: len(info.shape) - 1}
        axes = tuple(sorted(swapped.get(axis, axis) for axis in axes))
    return Job(info, None if job.layout is None else Layout.of(info.shape, axes))


def _under_one_name(scope: Scope, names: Collection[str], copies: Mapping[str, str]) -> Scope:
    """The scope, in which patterns that match a copy of a tied tensor name the tensor that is compared."""

    def renamed(globs: Sequence[str]) -> tuple[str, ...]:
        globs = (globs,) if isinstance(globs, str) else globs  # as elsewhere, one pattern stands for itself
        kept = [glob for glob in globs if matching([glob], names) or not matching([glob], copies)]
        return (*kept, *sorted({copies[name] for name in matching(globs, copies)}))

    if not copies:
        return scope
    include, exclude, only = map(renamed, (scope.include, scope.exclude, scope.only))
    return replace(scope, include=include, exclude=exclude, only=only)


def _refuse_other_names(
    base: Checkpoint, tuned: Checkpoint, given: Mapping[str, TensorInfo], prefixes: Prefixes
) -> None:
    """Refuse two checkpoints with unlike names; ``given``: the tuned tensors by the names in their files."""
    common = base.tensors.keys() & tuned.tensors.keys()
    layered = all(any(map(_in_layer, side.tensors)) for side in (base, tuned))
    comparable = not layered or any(map(_in_layer, common))
    fitting = fitting_prefixes(base.tensors, given)
    if fitting and not (prefixes and common and comparable):
        raise MismatchError(
            f"{tuned.name} has the tensors of {base.name} under another prefix",
            expected=_first_names(base.tensors),
            found=_first_names(given),
            hint=f"have the names changed while they are read: {fitting}",
        )
    if not common:
        raise _nothing_common(base, tuned)
    if not comparable:
        raise MismatchError(
            f"{base.name} and {tuned.name} have no tensor of a layer in common",
            expected=_first_names(filter(_in_layer, base.tensors)),
            found=_first_names(filter(_in_layer, tuned.tensors)),
            hint=why_unlike(base, tuned) or f"what they have in common: {_first_names(common)}",
        )


def _in_layer(name: str) -> bool:
    return any(part.isdecimal() for part in name.split("."))


def _refuse_unequal(
    scope: Scope,
    common: Mapping[str, TensorInfo],
    differing: Mapping[str, tuple[str, str]],
    only: Mapping[str, Sequence[str]],
) -> None:
    """Refuse a pattern that matches tensors, but none that can be compared."""
    axes = [glob for glob, _ in (scope.axis.items() if isinstance(scope.axis, Mapping) else scope.axis)]
    for option, globs in (("include", scope.include), ("only", scope.only), ("axis", axes)):
        for glob in (globs,) if isinstance(globs, str) else globs:
            if matching([glob], common):
                continue
            if found := sorted(matching([glob], differing)):
                expected, other = differing[found[0]]
                raise MismatchError(
                    f"[[{option}]] {glob!r} matches only tensors of unequal shape or dtype",
                    tensor=found[0],
                    expected=expected,
                    found=other,
                    hint="neurons are compared one by one: save both with equal shapes, or leave it out",
                )
            for side, names in only.items():
                if found := sorted(matching([glob], names)):
                    raise MismatchError(
                        f"[[{option}]] {glob!r} matches only tensors that {side} alone has", tensor=found[0]
                    )


def _nothing_common(base: Checkpoint, tuned: Checkpoint) -> MismatchError:
    both = sorted(base.tensors.keys() & tuned.tensors.keys())
    what = f"{base.name} and {tuned.name} have no tensor in common"
    hint = why_unlike(base, tuned)
    if not both:
        return MismatchError(
            what,
            expected=_first_names(base.tensors),
            found=_first_names(tuned.tensors),
            hint=hint or "they are not of one model, or one was saved under other names",
        )
    name = both[0]
    a, b = base.tensors[name], tuned.tensors[name]
    if a.shape == b.shape:
        hint = hint or "convert one of them, so that both have the same dtype"
    return MismatchError(
        f"{what} of the same shape and dtype",
        tensor=name,
        expected=a.describe(),
        found=b.describe(),
        hint=hint,
    )


def _first_names(tensors: Iterable[str]) -> str:
    names = [name[:80] for name in sorted(tensors, key=natural_key)]
    return ", ".join([*names[:2], *(["…"] if len(names) > 2 else [])]) or "no tensors"


def _nothing_scored(base: Checkpoint, tuned: Checkpoint, anatomy: Anatomy) -> MismatchError:
    reasons: dict[str, list[str]] = {}
    for entry in anatomy.listed:
        reasons.setdefault(entry.reason, []).append(entry.info.name)
    most = sorted(reasons.items(), key=lambda item: -len(item[1]))[:3]
    found = "; ".join(f"{len(names)} {reason} (first: {names[0][:80]})" for reason, names in most)
    return MismatchError(
        f"no neuron of the anatomy {anatomy.name} can be scored",
        file=base.name,
        found=found,
        hint=why_unlike(base, tuned) or "see [[include]], [[axis]] and [[anatomy]]",
    )
