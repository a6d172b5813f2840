"""The probes of the live model, which score neurons on examples: by `probe_sums`, or by a short fine-tune."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance
from ..errors import MismatchError
from ..live.placement import LivePlace, live_places
from ..neurons.anatomy import Anatomy
from ..neurons.layout import described
from ..scoring.scored_tensors import arranged
from ..scoring.scores import SCORES_KEY, SCORES_VERSION, Scores
from ..storage.threads import Limits
from ..surgery.diff import DiffPlan, describe_tensors
from ..surgery.pairing import pair
from ..tensors.arrays import Float64Array
from ..tensors.document import dump
from ..tensors.writer import written_file
from .examples import Example, collator
from .probe_sums import KINDS, add_batches, finished
from .trainer import RunCallback, Watcher

if TYPE_CHECKING:
    from .train_plan import TrainPlan


#: Batches of a gradient probe, or steps of the fine-tune, if the recipe gives no number.
STEPS = 100
_SCORES = {"gradients": "gradient"}  # of probes that are not called as their scores


def gradient_scores(
    model: nn.Module,
    base: Checkpoint,
    anatomy: Anatomy,
    batches: Iterable[Mapping[str, Tensor]],
    out: str | os.PathLike[str] | None = None,
    *,
    score: str = "gradient",
    against: Iterable[Mapping[str, Tensor]] = (),
    adjust: Callable[[dict[str, Float64Array]], object] = lambda scores: None,
    told: Callable[[int, float], bool] = lambda done, loss: False,
    saved: Path | None = None,
) -> Scores | None:
    """Score the neurons of ``anatomy`` of ``base``, whose live model is given, into a scores file.

    A batch holds the model's keyword arguments, ``labels`` included, on its device; ``against``: batches of
    the other texts, for score ``activation``. ``adjust`` may change the scores before they are written.
    ``told`` gets the number of batches done and the last loss. If it returns True, the probe stops, to go on
    from ``saved`` the next time, and the result is None.
    """
    places = live_places(model, {tensor.info.name: tensor.layout for tensor in anatomy.scored})
    weights = dict(model.named_parameters(remove_duplicate=False))
    layouts = {place.parameter: place.layout for found in places.values() for place in found}
    for name, found in places.items():
        if any(place.layout != layouts[place.parameter] for place in found):
            raise MismatchError("another tensor has neurons along another axis of its weight", tensor=name)
    running = {name: KINDS[score](weights[name], layout) for name, layout in layouts.items()}
    count = _load_sums(running, saved)
    numbered = chain(zip(repeat(0), batches), zip(repeat(1), against))
    with closing(add_batches(model, running, islice(numbered, count, None))) as losses:
        for loss in losses:
            count += 1
            if told(count, loss):
                _save_sums(running, saved, count)
                return None
    live = {name: running.pop(name).sums(max(count, 1)) for name in list(running)}
    sums = {name: _of_file(found, live) for name, found in places.items()}
    units = sum_units(anatomy, sums)
    values = {name: finished(score, each) for name, each in sums.items()}
    adjust(values)
    return write_scores(score, values, base, anatomy, units, out)


def _load_sums(sums: Mapping[str, Any], file: Path | None) -> int:
    """Load the sums of a probe that was stopped; returns of how many batches."""
    if file is None or not file.exists():
        return 0
    with safe_open(file, "pt") as saved:
        count = int(saved.metadata()["batches"])
        for name, one in sums.items():
            one.total, one.count = saved.get_tensor(name).to(one.total.device), count  # at most
    return count


def _save_sums(sums: Mapping[str, Any], file: Path | None, count: int) -> None:
    assert file is not None  # a probe that can be stopped has one
    totals = {name: one.total for name, one in sums.items()}
    save_file(totals, file.with_suffix(".part"), metadata={"batches": str(count)})
    file.with_suffix(".part").replace(file)


def _of_file(places: Sequence[LivePlace], live: Mapping[str, Float64Array]) -> Float64Array:
    """The sums of a tensor's neurons, from those of the weights in which they lie."""
    found = np.zeros((len(live[places[0].parameter]), places[0].file.count))
    for place in places:
        index = place.index_of(np.arange(place.file.count))
        found[:, index >= 0] = live[place.parameter][:, index[index >= 0]]
    return found


def sum_units(anatomy: Anatomy, sums: dict[str, Float64Array]) -> dict[str, NDArray[np.int64]]:
    """Replace the sums of each neuron by those of its unit; returns the unit of every neuron, per tensor.

    A unit's vector is the concatenation of its neurons' vectors, so its sums are the totals of theirs.
    Without units, nothing changes.
    """
    ids = {t.info.name: t.units.ids() for t in anatomy.scored if t.units is not None}
    if ids:
        rows = len(next(iter(sums.values())))
        total = np.zeros((rows, 1 + max(int(unit.max()) for unit in ids.values())))
        for name, unit in ids.items():
            mine = unit >= 0
            for row, values in zip(total, sums[name], strict=True):
                np.add.at(row, unit[mine], values[mine])
        for name, unit in ids.items():
            sums[name] = total[:, np.maximum(unit, 0)]
    return ids


def write_scores(
    score: str,
    values: Mapping[str, NDArray[np.float64]],
    base: Checkpoint,
    anatomy: Anatomy,
    units: Mapping[str, NDArray[np.int64]],
    out: str | os.PathLike[str] | None = None,
) -> Scores:
    """Write scores by tensor in the format of `neftsurgery.diff`; neurons outside the anatomy get NaN.

    ``units``: the unit of each neuron; the neurons of one have the same score. Without ``out``: temporary.
    """
    for tensor in anatomy.scored:
        values[tensor.info.name][~tensor.counted()] = np.nan
        if tensor.units is not None:
            values[tensor.info.name][units[tensor.info.name] < 0] = np.nan
    biases = {t.bias for t in anatomy.scored if t.bias is not None}
    companions = [entry.info for entry in anatomy.listed if entry.info.name in biases]
    facts = {
        "version": SCORES_VERSION,
        "score": score,
        "anatomy": anatomy.name,
        "parameters": base.parameters,
        "base": Provenance.of(base).to_json(),
        "nonfinite": 0,
        **describe_tensors(anatomy.scored),
        "unscored": {
            info.name: {"reason": "bias", **described(info, range(len(info.shape)))} for info in companions
        },
    }
    # Nothing has changed yet. Being listed with its axes lets a bias go with its neurons.
    counts, kinds = {name: len(value) for name, value in values.items()}, ["score", *(["unit"] * bool(units))]
    starts, arrays = arranged(counts, {}, kinds)
    metadata = dump(SCORES_KEY, facts)
    with written_file(arrays, metadata, out) as written:
        for name, value in values.items():
            written.write("score", starts[name], value.astype(np.float32))
        for name, ids in units.items():
            written.write("unit", starts[name], ids)
        written.finish(metadata)
    return Scores(written.reader())


def probe(
    plan: TrainPlan, model: Any, device: torch.device, *, limits: Limits, watcher: Watcher
) -> Scores | None:
    """Score the neurons on the training examples; the scores file stays in the run directory.

    None: the watcher stopped the probe, and it is saved.
    """
    directory, recipe = plan.run_directory, plan.recipe
    directory.scores.unlink(missing_ok=True)
    steps = recipe.probe.steps or STEPS
    try:
        if recipe.probe.by == "finetune":
            watcher.note(f"fine-tuning the whole model for {steps} steps to see which neurons change")
            return _finetune_scores(plan, steps, limits, watcher)
        assert plan.choice.anatomy is not None  # planned for a probe
        batches, others = drawn(plan, plan.examples.train, steps), drawn(plan, plan.examples.against, steps)
        every, what = [*batches, *others], "activations" if others else "gradients"
        watcher.note(f"scoring neurons by their {what} on {len(every)} batches")
        model.to(device)
        with watcher.progress("probe", len(every)) as advance:
            shown, start, tokens = 0, time.perf_counter(), 0

            def told(done: int, loss: float) -> bool:
                nonlocal shown, tokens
                advance(done - shown)
                shown, tokens = done, tokens + sum(len(one["input_ids"]) for one in every[done - 1])
                if done % (recipe.train.logging_steps or 1) == 0:
                    speed = tokens / (time.perf_counter() - start)
                    text = f"loss {loss:.4f}, {speed:,.0f} tokens/s"
                    watcher.report(f"probe, batch {done} of {len(every)}", text)
                return watcher.stop() and done < len(every)

            return gradient_scores(
                model, plan.base, plan.choice.anatomy, collated(plan, batches, device), directory.scores,
                against=collated(plan, others, device), score=_SCORES.get(recipe.probe.by, recipe.probe.by),
                told=told, saved=directory.probed,
            )  # fmt: skip
    finally:
        plan.base.close()


def drawn(plan: TrainPlan, examples: Sequence[Example], count: int, step: int = 0) -> list[list[Example]]:
    """At most ``count`` batches, by the recipe's seed and ``step``; no example is drawn twice."""
    size, order = plan.recipe.train.batch_size, list(range(len(examples)))
    random.Random(plan.recipe.train.seed + step).shuffle(order)
    starts = range(0, min(len(order), count * size), size)
    return [[examples[n] for n in order[start : start + size]] for start in starts]


def collated(plan: TrainPlan, batches: Iterable[list[Example]], device: Any) -> Iterator[dict[str, Tensor]]:
    """The arguments of the model for each batch."""
    for batch in map(collator(plan.tokenizer), batches):
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _finetune_scores(plan: TrainPlan, steps: int, limits: Limits, watcher: Watcher) -> Scores | None:
    """Fine-tune a copy of the whole model, score its change, and delete it; None if it was stopped."""
    recipe, directory = plan.recipe, plan.run_directory
    model = plan.load_model(quantized=False)
    dtype = model.dtype
    model.to(torch.float32)  # the steps of a short fine-tune are smaller than the rounding of bfloat16
    saves = directory.probe / "trainer"
    args = plan.trainer_arguments(
        saves, steps=steps, save_every=steps, dev=False,
        learning_rate=recipe.probe.learning_rate, save_strategy="no", report_to="none",
    )  # fmt: skip
    with watcher.progress("probe", steps) as advance:
        callback = RunCallback(watcher, advance)
        trainer = Trainer(
            model=model, args=args, train_dataset=plan.examples.train,
            data_collator=collator(plan.tokenizer), callbacks=[callback],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        saved = next(iter(saves.glob("checkpoint-*/trainer_state.json")), None)  # a save's last file
        trainer.train(resume_from_checkpoint=None if saved is None else str(saved.parent))
    if callback.stopped:
        return None
    model.to(device="cpu", dtype=dtype).save_pretrained(directory.probe / "tuned")
    del trainer, model
    tuned = Checkpoint.open(directory.probe / "tuned")
    sides = pair(plan.base, tuned, recipe.select.scope)
    comparison = DiffPlan(
        sides, recipe.select.score or "cosine", recipe.select.seed, directory.scores, rank=recipe.select.rank
    )
    scores = comparison.run(limits=limits)
    tuned.close()
    shutil.rmtree(directory.probe)
    return scores
