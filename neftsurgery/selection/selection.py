"""A selection: which neurons, per tensor, and how they were chosen, as its file records it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance, require_tensors
from ..errors import MismatchError, boundary
from ..neurons.layout import Layout, described, described_tensor
from ..neurons.vectors import blocks, check_index
from ..storage.output_checks import refuse_output
from ..tensors.arrays import Int64Array
from ..tensors.document import Fact, Facts, as_number, as_text, bad, dump, read_document
from ..tensors.dtypes import DTYPES
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile
from ..tensors.writer import written_file
from ..text import lines, percent, plural

SELECTION_KEY = "neuron_selection"
_VERSION = 1
_WHAT = "selection"


class SelectionFacts(Facts):
    """The facts of a selection file, and the ``selection`` of a patch's manifest, which may hold more."""

    score = Fact(as_text)  # they were chosen by
    anatomy = Fact(as_text)  # what counts as a neuron: ``rows``, ``ffn`` or ``units``
    policy = Fact(as_text)  # which neurons come first: ``sensitive``, ``reversed`` or ``random``
    budget = Fact(Facts.from_json)  # the options that say how many, as `Budget.describe` writes them
    captured = Fact(as_number)  # the share of the squared change of all common tensors that they hold
    captured_scored = Fact(as_number)  # that of the scored tensors
    base = Fact(Provenance.from_json)  # they were chosen on
    tuned = Fact(Provenance.from_json)  # the fine-tuned checkpoint they were chosen by

    @property
    def companion_biases(self) -> frozenset[str]:
        """The tensors (biases, scales) that only go with the neurons of others; ``followers`` in files."""
        found = self.get("followers")
        names = found if isinstance(found, list) else []
        return frozenset(name for name in names if isinstance(name, str))

    def for_patch(self, *, captured: bool) -> Self:
        """What a patch records, which names its own base; ``captured``: whether the shares are of it, too."""
        left_out = {"base", "tuned", *(key for key in self if key.startswith("captured") and not captured)}
        return type(self)({key: value for key, value in self.items() if key not in left_out})


def index_dtype(count: int) -> str:
    """The element type of indices into ``count`` neurons: ``"I32"``, or ``"I64"`` past 2**31."""
    return "I32" if count <= 1 << 31 else "I64"


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """The chosen neurons of one tensor; ``index`` is ascending, int64 ``[k]``."""

    info: TensorInfo
    layout: Layout
    index: Int64Array

    @property
    def parameters(self) -> int:
        """Elements of the chosen vectors."""
        return len(self.index) * self.layout.width

    def describe(self) -> dict[str, object]:
        """Its entry in the ``tensors`` of a file."""
        return described(self.info, self.layout.axes)


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Chosen vectors ``[start, stop)`` (positions in the index) of one tensor, and their size."""

    name: str
    start: int
    stop: int
    nbytes: int


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Selection:
    """Chosen neurons by tensor name, with at least one each."""

    tensors: Mapping[str, Chosen]  # ordered by name (code points)
    facts: SelectionFacts  # how they were chosen, as far as that is known

    def __init__(self, tensors: Mapping[str, Chosen], facts: Mapping[str, object]) -> None:
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "facts", SelectionFacts(facts))

    def __repr__(self) -> str:
        return f"<Selection of {plural(self.neurons, 'neuron')} in {plural(len(self.tensors), 'tensor')}>"

    def __str__(self) -> str:
        facts = self.facts
        how = [one for one in (facts.policy, facts.score, facts.anatomy) if one]
        how += [f"{key} {value}" for key, value in facts.budget.items() if key not in ("policy", "seed")]
        said = [
            f"selection of {plural(self.neurons, 'neuron')} in {plural(len(self.tensors), 'tensor')}, "
            f"{plural(self.parameters, 'parameter')}"
        ]
        if how:
            said.append(f"  chosen by {', '.join(how)}")
        if facts.captured is not None:
            said.append(f"  it captures {percent(facts.captured)} of the whole change")
        return lines(said)

    def __iter__(self) -> Iterator[Chosen]:
        return iter(self.tensors.values())

    def __len__(self) -> int:
        return self.neurons

    @cached_property
    def neurons(self) -> int:
        """How many neurons are chosen, bias elements not counted."""
        return sum(self.counts.values())

    @cached_property
    def parameters(self) -> int:
        """How many elements are chosen, bias elements included."""
        return sum(chosen.parameters for chosen in self)

    def describe(self) -> dict[str, object]:
        """For JSON: how many neurons and parameters are chosen, and how many neurons per tensor."""
        tensors = {name: len(chosen.index) for name, chosen in self.tensors.items()}
        return {"selected": self.neurons, "selected_parameters": self.parameters, "tensors": tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of the chosen vectors."""
        return sum(chosen.parameters * chosen.info.type.itemsize for chosen in self)

    def blocks(self, block: int | None = None) -> Iterator[RowBlock]:
        """All chosen vectors, tensor by tensor, in ranges of bounded size."""
        for name, chosen in self.tensors.items():
            size = chosen.layout.width * chosen.info.type.itemsize
            for start, stop in blocks(chosen.info, chosen.layout, len(chosen.index), block):
                yield RowBlock(name, start, stop, (stop - start) * size)

    @property
    def counts(self) -> dict[str, int]:
        """How many per tensor: what ``like=`` takes. Companion biases are left out."""
        return {name: len(chosen.index) for name, chosen in self.own.items()}

    @property
    def own(self) -> dict[str, Chosen]:
        """What is chosen, without companion biases."""
        biases = self.facts.companion_biases
        return {name: chosen for name, chosen in self.tensors.items() if name not in biases}

    def require_fit(self, *checkpoints: Checkpoint) -> None:
        """Raise a `MismatchError` if no neuron is chosen, or a checkpoint lacks one of the tensors."""
        if not self.tensors:
            hint = "the scored neurons may be equal (diff says what else differs), or the threshold too high"
            raise MismatchError("no neuron is chosen", hint=hint)
        for checkpoint in checkpoints:
            require_tensors(checkpoint, (chosen.info for chosen in self), "the selection")

    @boundary
    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write a selection file, whole or not at all; without ``force``, a `UsageError` if it exists."""
        refuse_output(path, inputs=[], force=force, kind="file")
        entries = [
            TensorInfo(f"{name}:index", index_dtype(c.layout.count), (len(c.index),))
            for name, c in self.tensors.items()
        ]
        content = {"version": _VERSION, **self.facts}
        content["tensors"] = {name: chosen.describe() for name, chosen in self.tensors.items()}
        metadata = dump(SELECTION_KEY, content)
        with written_file(entries, metadata, path, force=force) as written:
            for name, chosen in self.tensors.items():
                kind = DTYPES[index_dtype(chosen.layout.count)].numpy
                written.write(f"{name}:index", 0, chosen.index.astype(kind))
            written.finish(metadata)

    @classmethod
    @boundary
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read a selection file; a `CorruptFileError` says that it is not one, or damaged."""
        with TensorFile.named(path, SELECTION_KEY) as file:
            content = read_document(file, SELECTION_KEY, _WHAT, _VERSION)
            tensors = {}
            for name in sorted(content["tensors"]):
                info, layout = described_tensor(file, _WHAT, name, content["tensors"][name])
                entry = file.tensors.get(f"{name}:index")
                if entry is None or entry.dtype not in ("I32", "I64") or len(entry.shape) != 1:
                    raise bad(file, _WHAT, "its index is missing, or not a vector of integers", name)
                index = file.array(entry.name).astype(np.int64)
                if why := check_index(index, layout.count):
                    raise bad(file, _WHAT, why, name)
                if len(index):
                    tensors[name] = Chosen(info, layout, index)
        facts = {key: value for key, value in content.items() if key not in ("version", "tensors")}
        return cls(tensors, facts)
