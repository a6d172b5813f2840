"""Two checkpoints side by side: what they have in common, what is scored of it, what is not and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..checkpoint.adapter import AdaptedWeights
from ..checkpoint.checkpoint import Checkpoint, Side
from ..checkpoint.folder_files import file_notes, not_compared
from ..checkpoint.provenance import same_tensor
from ..checkpoint.ties import Joined, join
from ..errors import MismatchError
from ..neurons.anatomy import Anatomy, NeuronTensor, read_anatomy
from ..neurons.layout import Layout
from ..neurons.tensor_names import matching
from ..options import Scope
from ..scoring.engine import Job
from ..tensors.header import TensorInfo
from ..tensors.reader import WeightReader
from ..text import natural_key

__all__ = ["Pair", "described", "pair", "scoped_anatomy", "scored_count"]


@dataclass(frozen=True)
class Pair:
    """A base and a tuned checkpoint, planned: no weight is read yet."""

    base: Checkpoint
    joined: Joined  # with the tuned model
    anatomy: Anatomy  # of the tensors in common, each once
    differing: Mapping[str, tuple[str, str]]  # of another shape or dtype: both descriptions

    @property
    def tuned(self) -> Side:
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
        layers: dict[str, int] = {}
        keys: dict[str, tuple[int, ...]] = {}
        jobs: dict[str, Job] = {}
        for tensor in sorted(self.anatomy.scored, key=lambda t: self.base.position(t.info.name)):
            name = tensor.info.name
            stage = layers.setdefault(tensor.layer, len(layers)) if tensor.units is not None else 0
            keys[name] = (stage, *self.base.position(name))
            jobs[name] = Job(tensor.info, tensor.layout)
        for entry in self.anatomy.listed:
            name = entry.info.name
            axes = self.companion_biases.get(name)
            keys[name] = (len(layers), *self.base.position(name))
            jobs[name] = Job(entry.info, None if axes is None else Layout.of(entry.info.shape, axes))
        return [jobs[name] for name in sorted(jobs, key=lambda name: keys[name])]

    @cached_property
    def compared(self) -> tuple[WeightReader, WeightReader, list[Job]]:
        """The two sides and the jobs as they are scored: beside an adapter in float32, as it is computed."""
        if not isinstance(self.tuned, AdaptedWeights):
            return self.base, self.tuned, self.jobs
        base, tuned = self.tuned.in_float32()
        return base, tuned, [Job(base.tensors[job.info.name], job.layout) for job in self.jobs]

    @property
    def neurons(self) -> int:
        """How many neurons are scored."""
        return sum(map(scored_count, self.anatomy.scored))

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far, of both."""
        return self.base.bytes_read + self.tuned.bytes_read

    @property
    def nbytes(self) -> int:
        """Bytes that comparing them reads."""
        return 2 * sum(job.info.nbytes for job in self.jobs)

    def describe(self) -> dict[str, object]:
        """For JSON: what does not match."""
        return {
            "only_in_base": list(self.joined.only_base),
            "only_in_tuned": list(self.joined.only_tuned),
            "differing": {name: {"base": a, "tuned": b} for name, (a, b) in self.differing.items()},
        }


def pair(base: Checkpoint, tuned: Side, scope: Scope) -> Pair:
    """Plan the comparison of two checkpoints; if nothing of them can be scored, a `MismatchError`."""
    joined = join(base, tuned)
    tuned = joined.tuned
    common = {
        name: info
        for name, info in base.tensors.items()
        if name not in joined.copies and same_tensor(info, tuned.tensors.get(name))
    }
    if not common:
        raise _nothing_common(base, tuned)
    anatomy = scoped_anatomy(_under_one_name(scope, common, joined.copies), common, base.config)
    shared = base.tensors.keys() & tuned.tensors.keys()
    both = sorted(shared - common.keys() - joined.copies.keys(), key=natural_key)
    differing = {name: (base.tensors[name].describe(), tuned.tensors[name].describe()) for name in both}
    result = Pair(base, joined, anatomy, differing)
    if not anatomy.scored and not any(entry.included and entry.axes for entry in anatomy.listed):
        raise _nothing_scored(base, anatomy)
    return result


def scoped_anatomy(
    scope: Scope, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None
) -> Anatomy:
    """The neurons of a checkpoint's tensors that are looked at."""
    patterns = {"include": scope.include, "exclude": scope.exclude, "only": scope.only}
    return read_anatomy(scope.anatomy, tensors, config, axis=scope.axis, **patterns)


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


def described(info: TensorInfo, axes: Sequence[int] | None = None) -> dict[str, Any]:
    """What files and JSON say of a tensor and, if it has any, of its neurons."""
    facts = {"shape": list(info.shape), "dtype": info.dtype}
    return facts if axes is None else facts | {"neuron_axes": list(axes)}


def scored_count(tensor: NeuronTensor) -> int:
    """How many neurons of a tensor are scored."""
    return tensor.layout.count if tensor.part is None else tensor.part.count


def _nothing_common(base: Side, tuned: Side) -> MismatchError:
    both = sorted(base.tensors.keys() & tuned.tensors.keys())
    what = f"{base.name} and {tuned.name} have no tensor in common"
    if not both:
        return MismatchError(
            what,
            expected=_first_names(base),
            found=_first_names(tuned),
            hint="they are not of one model, or one was saved under other names",
        )
    name = both[0]
    a, b = base.tensors[name], tuned.tensors[name]
    hint = "convert one of them, so that both have the same dtype" if a.shape == b.shape else None
    return MismatchError(
        f"{what} of the same shape and dtype",
        tensor=name,
        expected=a.describe(),
        found=b.describe(),
        hint=hint,
    )


def _first_names(side: Side) -> str:
    names = [name[:80] for name in sorted(side.tensors, key=natural_key)]
    return ", ".join([*names[:2], *(["…"] if len(names) > 2 else [])]) or "no tensors"


def _nothing_scored(base: Checkpoint, anatomy: Anatomy) -> MismatchError:
    reasons: dict[str, list[str]] = {}
    for entry in anatomy.listed:
        reasons.setdefault(entry.reason, []).append(entry.info.name)
    most = sorted(reasons.items(), key=lambda item: -len(item[1]))[:3]
    found = "; ".join(f"{len(names)} {reason} (first: {names[0][:80]})" for reason, names in most)
    return MismatchError(
        f"no neuron of the anatomy {anatomy.name} can be scored",
        file=base.name,
        found=found,
        hint="see [[include]], [[axis]] and [[anatomy]]",
    )
