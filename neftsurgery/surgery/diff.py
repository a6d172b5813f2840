"""diff: score every neuron of two checkpoints, streaming both and loading neither."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.dequantized import refuse_nonfinite
from ..checkpoint.name_prefixes import Prefixes
from ..checkpoint.provenance import Provenance
from ..errors import UsageError, boundary
from ..neurons.anatomy import NeuronTensor
from ..neurons.layout import described
from ..options import (
    CompareOptions,
    DiffOptions,
    PrefixOptions,
    RunAnywhereOptions,
    Scope,
    ScopeOptions,
    ScoreOptions,
    SeedOptions,
    split,
)
from ..progress import Progress, Stopwatch, silent
from ..scoring import code_kernels, kernels
from ..scoring.engine import TensorResult
from ..scoring.scored_tensors import SUMS, arranged
from ..scoring.scores import SCORES_KEY, SCORES_VERSION, Scores
from ..scoring.sums import BASE_SCORES, SCORES, LayerUnits, Sums, low_rank_energies, norms, random_scores
from ..storage.output_checks import AnyPath, refuse_output
from ..storage.threads import Limits
from ..tensors.arrays import Float32Array, Float64Array
from ..tensors.document import dump
from ..tensors.header import TensorInfo
from ..tensors.writer import TensorFileWriter, written_file
from .pairing import Pair, open_sides, pair
from .verb import running, warn

_BATCH, _MOST = 1 << 16, 1 << 19  # neurons whose numbers are written at once, if possible and in any case
_WIDEST = {"base_sq": -1.2345678901234567e-300, "delta_sq": -1.2345678901234567e-300, "changed": 1 << 62}


@dataclass(frozen=True)
class DiffPlan:
    """Which checkpoints are compared and how. Headers are read; of weights, only what may be tied."""

    pair: Pair
    score: str = "cosine"
    seed: int = 0  # of the score "random"
    out: Path | None = None  # None: a temporary file
    force: bool = False
    sums: bool = True  # whether the file is to hold the sums that scores derive from
    rank: int = 32  # of the score "lowrank"
    alone: bool = False  # whether the base is scored by itself

    @property
    def warnings(self) -> Sequence[str]:
        """Sentences for the user."""
        return self.pair.warnings

    def describe(self) -> dict[str, object]:
        """For ``--dry-run`` and JSON."""
        return {
            "base": self.pair.base.name,
            "tuned": None if self.alone else self.pair.tuned.name,
            "score": self.score,
            "anatomy": self.pair.anatomy.name,
            "scored_tensors": len(self.pair.anatomy.scored),
            "common_tensors": len(self.pair.jobs),
            "neurons": self.pair.anatomy.neurons,
            "units": self.pair.anatomy.unit_count,
            "selected": 0,
            "bytes_to_read": self.pair.nbytes,
            "out": None if self.out is None else str(self.out),
            "warnings": list(self.warnings),
            "tied": dict(self.pair.joined.copies),
            "not_compared": self.pair.not_compared,
            **self.pair.describe(),
        }

    def run(self, *, limits: Limits | None = None, progress: Progress = silent) -> Scores:
        """Read both sides once, and write the scores."""
        limits = limits or Limits.of()
        base, _, jobs = self.pair.compared
        kernels.prepare(base.tensors[job.info.name].dtype for job in jobs)
        code_kernels.prepare(job.codes[0].weight.kind for job in jobs if job.codes is not None)
        with Stopwatch(*(() if limits.executor else (self.pair.base, self.pair.tuned))) as watch:
            facts = self._facts()
            room = dump(
                SCORES_KEY, {**facts, "nonfinite": 1 << 62, "unscored": _unscored(self.pair, _WIDEST)}
            )
            starts, arrays = _arrays(self.pair, SUMS if self.sums else ())
            with written_file(arrays, room, self.out, force=self.force) as written:
                sink = _Sink(self, starts, written)
                with progress("scoring", 2 * sum(job.info.nbytes for job in jobs)) as advance:
                    for result in self.pair.results(limits, advance):
                        sink.take(result)
                sink.finish()
                for side in (self.pair.base, self.pair.tuned):
                    side.check_unchanged()
                written.finish(
                    dump(SCORES_KEY, {**facts, "nonfinite": sink.nonfinite, "unscored": sink.unscored})
                )
            scores = Scores(written.reader())
        watch.bytes_read += self.pair.nbytes if limits.executor else 0
        scores.timing = watch.timing
        return scores

    def _facts(self) -> dict[str, object]:
        return {
            "version": SCORES_VERSION,
            "score": self.score,
            "anatomy": self.pair.anatomy.name,
            "parameters": self.pair.parameters,
            "base": Provenance.of(self.pair.base).to_json(),
            **({} if self.alone else {"tuned": Provenance.of(self.pair.tuned).to_json()}),
            **({"seed": self.seed} if self.score == "random" else {}),
            **({"rank": self.rank} if self.score == "lowrank" else {}),
            **self.pair.describe(),
            **_quantized(self.pair),
            **describe_tensors(self.pair.anatomy.scored),
        }

    def energies(self, name: str) -> Float64Array:
        """Of a tensor's neurons, in the approximation of rank ``rank``."""
        base, _, jobs = self.pair.compared
        layout = next(job.layout for job in jobs if job.info.name == name)
        assert layout is not None  # only tensors with neurons are scored
        return low_rank_energies(base, base.tensors[name], layout, self.rank)


@boundary
def diff(
    base: AnyPath,
    tuned: AnyPath | None = None,
    *,
    out: AnyPath | None = None,
    force: bool = False,
    sums: bool = True,
    **options: Unpack[DiffOptions],
) -> Scores:
    """Score every neuron of a tuned checkpoint against its base.

    Args:
        base, tuned: Checkpoints: a file, a folder, or a Hub id. They may be sharded differently. ``tuned``
            may be the folder of a PEFT LoRA adapter of the base: it is scored as if merged in float32. None:
            for scores of the base alone.
        out: Where to write the scores file. None: the scores live in a temporary file until saved.
        force: Replace ``out`` if it exists.
        sums: Whether to write the sums that scores derive from, seven eighths of the file. ``captured``,
            budgets of all that changed and most of a report need them.
        strip_prefix, add_prefix: What is removed from the front of ``tuned``'s tensor names, and put there:
            ``strip_prefix="module."``. With both, it is put where the other was; without ``strip_prefix``,
            before names that ``base`` lacks.
        anatomy: What counts as a neuron: ``rows`` (default), ``ffn`` or ``units``.
        axis: Patterns of tensor names to neuron axes (``{"*.kernel": 1}``), the last match wins.
        include, exclude, only: Patterns of tensors to score in addition, to leave out, and of the only ones
            to score.
        score: ``cosine`` (default), ``l2``, ``relative``, ``changed``; of the base alone ``magnitude``,
            ``lowrank``, ``norm`` or ``random``.
        rank: For the score ``lowrank``; by default 32.
        seed: For the score ``random``; by default 0.
        threads: That read and score; by default two per core. The result does not depend on it.
        memory: Bytes of buffers and mapped files, by default 176 MiB. The result does not depend on it.
        executor: A ``concurrent.futures.Executor`` whose processes, here or on other machines, see the same
            paths or URLs: they read and compute instead of threads. The result does not depend on it.
        progress: Told of the bytes done.

    Raises:
        UsageError: For a path, name or option that makes no sense, or an ``out`` that exists.
        MismatchError: If the checkpoints have nothing in common that can be scored.
        CorruptFileError, MachineError: If a file is damaged; if something cannot be read or written.
    """
    run, compare = split("diff", options, RunAnywhereOptions, CompareOptions)
    machine = running(run)
    plan = plan_diff(base, tuned, out=out, force=force, sums=sums, **compare)
    warn(__name__, plan.warnings)
    return plan.run(**machine)


def plan_diff(
    base: AnyPath,
    tuned: AnyPath | None = None,
    *,
    out: AnyPath | None = None,
    force: bool = False,
    sums: bool = True,
    **options: Unpack[CompareOptions],
) -> DiffPlan:
    """Read the headers of two checkpoints and check everything that `diff` needs."""
    prefix, scope = split("diff", options, PrefixOptions, ScopeOptions, ScoreOptions, SeedOptions)[:2]
    score, seed, rank = options.get("score", "cosine"), options.get("seed", 0), options.get("rank", 32)
    check_score(score, rank)
    if seed < 0:
        raise UsageError("[[seed]] must not be negative", found=seed)
    if tuned is None and score not in BASE_SCORES:
        hint = f"name it, or take a score of the base alone: {', '.join(BASE_SCORES)}"
        raise UsageError(f"[[score={score}]] compares the base with a tuned checkpoint", hint=hint)
    first, second = open_sides(base, base if tuned is None else tuned, Prefixes.of(**prefix))
    place = refuse_output(out, inputs=[first.source.path, second.source.path], force=force, kind="file")
    sides = pair(first, second, Scope(**scope))
    return DiffPlan(sides, score, seed, place, force, sums, rank, tuned is None)


def check_score(score: str, rank: int = 1) -> None:
    """Raise a `UsageError` for an unknown score, or a rank that is none."""
    if rank < 1:
        raise UsageError("[[rank]] must be at least 1", found=rank)
    if score not in SCORES:
        raise UsageError(f"there is no score {score!r}", hint=f"known ones: {', '.join(SCORES)}")


def describe_tensors(tensors: Iterable[NeuronTensor]) -> dict[str, object]:
    """What a scores file says of the scored tensors: all descriptions, and the number of each one's."""
    numbers, names, examples = dict[tuple[object, ...], int](), dict[str, int](), list[NeuronTensor]()
    for t in tensors:
        key = (t.info.dtype, t.info.shape, t.axes, t.layer, t.kind, t.bias, t.part)
        number = names[t.info.name] = numbers.setdefault(key, len(examples))
        if number == len(examples):
            examples.append(t)
    descriptions = []
    for tensor in examples:
        entry = {**described(tensor.info, tensor.axes), "layer": tensor.layer, "kind": tensor.kind}
        if tensor.bias is not None:
            entry["bias"] = tensor.bias
        if tensor.part is not None:
            entry["part"] = [tensor.part.start, tensor.part.stop, tensor.part.step]
        descriptions.append(entry)
    return {"descriptions": descriptions, "tensors": names}


def _quantized(plan: Pair) -> dict[str, object]:
    """How many of the scored weights each side stores as codes; empty if neither does."""
    names = {tensor.info.name for tensor in plan.anatomy.scored}
    sides = {"base": plan.base.quantized, "tuned": plan.tuned.quantized}
    found = {side: len(names & weights.keys()) for side, weights in sides.items() if names & weights.keys()}
    return {"quantized": found} if found else {}


def _unscored(plan: Pair, totals: Mapping[str, float | int]) -> dict[str, dict[str, Any]]:
    """What the file says of the tensors that are not scored, each with ``totals``."""
    found: dict[str, dict[str, Any]] = {}
    for entry in plan.anatomy.listed:
        facts = found[entry.info.name] = {"reason": entry.reason, **described(entry.info), **totals}
        if entry.info.name in plan.companion_biases:
            axes = plan.companion_biases[entry.info.name]
            facts |= {"neuron_axes": list(axes), "included": entry.included}
    return found


def _arrays(plan: Pair, sums: Sequence[str]) -> tuple[dict[str, int], list[TensorInfo]]:
    """Where each tensor's numbers begin in the arrays of the file, and these."""
    counts = {tensor.info.name: tensor.layout.count for tensor in plan.anatomy.scored}
    elements = {name: plan.base.tensors[name].elements for name in plan.companion_biases}
    return arranged(counts, elements, ["score", *sums, *(["unit"] if plan.anatomy.name == "units" else [])])


class _Sink:
    """Takes results as they come, and writes in batches; the scores of units when their layer is done."""

    def __init__(self, diff: DiffPlan, starts: Mapping[str, int], writer: TensorFileWriter) -> None:
        self._diff, self._starts, self._writer, plan = diff, starts, writer, diff.pair
        self._left_out = set() if diff.sums else {*SUMS}
        self._waiting: list[tuple[list[str], Sums]] = []  # of tensors, by name
        self._neurons, self._last = 0, 0  # of those waiting: how many, and where the last tensor's begin
        self._sides = plan.base, plan.tuned
        self._scored = {tensor.info.name: tensor for tensor in plan.anatomy.scored}
        self.unscored = _unscored(plan, {"base_sq": 0.0, "delta_sq": 0.0, "changed": 0})
        self.nonfinite = 0
        self._layer: LayerUnits | None = None

    def take(self, result: TensorResult) -> None:
        tensor = self._scored.get(result.jobs[0].info.name)
        if tensor is None:
            self._list(result)
            return
        assert result.sums is not None  # its jobs have a layout
        for neuron, side in product(np.flatnonzero(~result.sums.finite)[:1].tolist(), self._sides):
            refuse_nonfinite(side, tensor.info, tensor.layout, neuron)
        if tensor.units is not None:
            if self._layer is None or self._layer.name != tensor.layer:
                self._finish_layer()
                tensors = [t for t in self._scored.values() if t.layer == tensor.layer]
                self._layer = LayerUnits(tensor.layer, tensors)
            self._layer.add(tensor, result.sums)
        names = [job.info.name for job in result.jobs]
        # The stacks of one span lie between each other: they are written together.
        first, last = self._starts[names[0]], self._starts[names[-1]]
        if self._neurons >= _BATCH and (first > self._last or self._neurons >= _MOST):
            self._write_batch()
        self._last = max(self._last, last) if self._waiting else last
        self._waiting.append((names, result.sums))
        self._neurons += len(result.sums.changed)

    def _list(self, result: TensorResult) -> None:
        """Record the change of a tensor that is not scored."""
        name = result.jobs[0].info.name
        entry = self.unscored[name]
        entry["changed"] = result.changed
        if entry["reason"].startswith("quantized"):
            entry["base_sq"] = entry["delta_sq"] = None  # codes without their scales: no numbers to subtract
            return
        for which, total in (("base_sq", result.base_sq), ("delta_sq", result.delta_sq)):
            # JSON has no infinity, which the squares of large F64 reach.
            entry[which] = float(np.nan_to_num(total))
        if result.sums is not None:
            self._write(self._starts[name], _changes(result.sums))

    def _write(self, start: int, numbers: Mapping[str, NDArray[Any]]) -> None:
        for which in numbers.keys() - self._left_out:
            self._writer.write(which, start, numbers[which])

    def _write_batch(self) -> None:
        waiting = sorted(self._waiting, key=lambda one: self._starts[one[0][0]])
        self._waiting, self._neurons = [], 0
        if not waiting:
            return
        tensors = [self._scored[name] for names, _ in waiting for name in names]
        sums = Sums.joined([sums for _, sums in waiting])
        numbers = {"base_sq": sums.aa, "dot": sums.ad, **_changes(sums)}
        counts = [tensor.layout.count for tensor in tensors]
        edges = np.cumsum([0, *counts])
        counted = np.concatenate([tensor.counted() for tensor in tensors])
        self.nonfinite += int(np.count_nonzero(~sums.finite & counted))
        if tensors[0].units is None:
            numbers["score"] = self._scores(tensors, sums)
            numbers["score"][~counted] = np.nan
        # Numbers that are neighbours in the file are written as one.
        starts = np.array([self._starts[tensor.info.name] for tensor in tensors])
        places = np.repeat(starts - edges[:-1], counts) + np.arange(edges[-1])
        if (np.diff(starts) < 0).any():
            order = np.argsort(places)
            places, numbers = places[order], {which: values[order] for which, values in numbers.items()}
        breaks = np.flatnonzero(np.diff(places) != 1) + 1
        for first, last in pairwise([0, *breaks, len(places)]):
            self._write(places[first], {which: values[first:last] for which, values in numbers.items()})

    def _scores(self, tensors: Sequence[NeuronTensor], sums: Sums) -> Float32Array:
        counts = [tensor.layout.count for tensor in tensors]
        if self._diff.score == "random":
            seed = self._diff.seed
            own = [random_scores(t.info.name, n, seed) for t, n in zip(tensors, counts, strict=True)]
        elif self._diff.score == "lowrank":
            own = [norms(self._diff.energies(tensor.info.name)) for tensor in tensors]
        else:
            widths = np.repeat([tensor.layout.width for tensor in tensors], counts)
            return sums.score(self._diff.score, widths)
        return np.where(sums.finite, np.concatenate(own), np.float32(np.nan))

    def _finish_layer(self) -> None:
        """Write the scores of the layer of units that is complete."""
        if self._layer is not None:
            for name, numbers in self._layer.numbers(self._diff.score, self._diff.seed, self._diff.energies):
                self._write(self._starts[name], numbers)

    def finish(self) -> None:
        """Write all that is left."""
        self._write_batch()
        self._finish_layer()


def _changes(sums: Sums) -> dict[str, NDArray[Any]]:
    """What is recorded of every neuron, scored or not."""
    return {"delta_sq": sums.dd, "changed": np.minimum(sums.changed, (1 << 32) - 1).astype(np.uint32)}
