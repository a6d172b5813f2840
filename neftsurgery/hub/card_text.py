"""The generated text of a model card: how to use the patch, where its neurons are, how they were chosen.

Names and values come from files, which may be hostile: they stand in code spans that they cannot leave.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ..patch.lossless import LosslessPatch
from ..patch.patch import Patch
from ..patch.patch_file import PATCH_NAME
from ..reporting.layer_map import LayerMap
from ..sources.hub_client import page
from ..tensors.arrays import Int64Array
from ..text import percent, plural, size
from .base_model import BaseModel

_PROJECT = "https://github.com/neftsurgery/neftsurgery"
_MAX_LISTED = 40
#: A larger table is not read: neighbouring layers are put together, and so are rare kinds.
_MAX_LAYERS = 40
_MAX_KINDS = 8
#: Keys of the manifest's ``selection``, and what the card calls them.
_SELECTION_LABELS = {
    "score": "score",
    "anatomy": "anatomy (what counts as a neuron)",
    "policy": "policy",
    "budget": "budget",
    "per": "one pool per",
    "max_per_tensor": "at most, per tensor",
    "seed": "seed",
    "merged": "merged from",
}
#: Characters that could end a code span or a table cell, or begin a tag or a comment.
_SPECIAL = "`|<>"
_MAX_LENGTH = 100
_BAR_LENGTH = 12


def card_text(patch: Patch | LosslessPatch, repo: str, base: BaseModel, figure: str | None) -> str:
    """The part of a card that `push` writes, in Markdown: from files only numbers and code spans."""
    model = link(code_span(base.repo), page(base.repo)) if base.repo else "the model it was made from"
    note = "" if base.repo else "`BASE` stands for the model that the patch was made from.\n\n"
    facts = "## What is in it\n\n" + table(["", ""], list(_facts(patch, base)))
    if isinstance(patch, LosslessPatch):
        lead, usage, more = _lossless_parts(patch, repo, model, base.argument)
    else:
        lead, usage, more = _neuron_parts(patch, repo, model, base.argument, figure)
    return "\n\n".join([lead, f"## How to use it\n\n{note}{usage}", facts, *more])


def _neuron_parts(
    patch: Patch, repo: str, model: str, base: str, figure: str | None
) -> tuple[str, str, list[str]]:
    """What the patch is, how it is used, and the sections after its facts."""
    lead = (
        f"A **neuron patch** for {model}: new values for {patch.what} ({patch.parameters:,} parameters, "
        f"{size(patch.nbytes)}). Every other weight of the base stays the same, bit for bit."
    )
    usage = f"""```console
$ pip install .   # in a clone of {_PROJECT}
$ neftsurgery apply {base} {repo} -o patched
$ neftsurgery verify patched {repo}
```

```python
import neftsurgery as ns

ns.apply("{base}", "{repo}", out="patched/")
attached = ns.attach(model, "{repo}")  # or in a live torch model; attached.detach() takes it out
```

`apply` checks every vector that it replaces against its hash in the patch. It refuses another base before it
writes anything. `neftsurgery revert` takes the patch out again, bit for bit.
[What a patch is]({_PROJECT}/blob/main/docs/patch-format.md)."""
    more = [_layers(LayerCounts.of_patch(patch), figure)]
    if chosen := list(_selection_facts(patch)):
        more.append("## How the neurons were chosen\n\n" + table(["", ""], chosen))
    if trained := list(_training_facts(patch)):
        more.append("## How the neurons were trained\n\n" + table(["", ""], trained))
    return lead, usage, more


def _lossless_parts(patch: LosslessPatch, repo: str, model: str, base: str) -> tuple[str, str, list[str]]:
    """As `_neuron_parts`."""
    tuned = f"{size(patch.forward.nbytes)} of weights in {plural(len(patch.forward.tensors), 'tensor')}"
    lead = (
        f"A **lossless patch** for {model}: the base plus these {size(patch.nbytes)} is the full "
        f"fine-tune, to the bit ({tuned})."
    )
    usage = f"""```console
$ neftsurgery apply {base} {repo} -o tuned
$ neftsurgery verify tuned {repo}
```

`apply` checks every block of the base and of the result against its hash. It refuses another base before it
writes anything."""
    rows = [
        [code_span(name, 80), percent(kind.changed / max(1, kind.elements)), size(kind.code)]
        for name, kind in list(patch.kinds().items())[:_MAX_LISTED]
    ]
    changed = table(["kind of weight", "changed", "bytes"], rows, right=[1, 2])
    return lead, usage, [f"## What changed\n\n{changed}"]


def _facts(patch: Patch | LosslessPatch, base: BaseModel) -> Iterator[tuple[str, str]]:
    """The rows of a table: of the base, of the patch, and of what undoes and made it."""
    if base.repo is not None:
        yield "base", link(code_span(base.repo), page(base.repo))
        yield "revision of the base", code_span(base.revision) if base.revision else "unknown"
    elif base.name:
        yield "local name of the base", code_span(base.name)
    if base.fingerprint:
        yield "fingerprint of the base", code_span(base.fingerprint)
    yield from _lossless_facts(patch) if isinstance(patch, LosslessPatch) else _neuron_facts(patch)
    yield "revert", "needs only the patch" if patch.reversible else "needs the base: `--base`"
    if created := patch.manifest.get("created_by"):
        yield "created by", code_span(created)


def _neuron_facts(patch: Patch) -> Iterator[tuple[str, str]]:
    yield "neurons", f"{patch.neurons:,}"
    yield "parameters", f"{patch.parameters:,}"
    dtypes = sorted({tensor.info.dtype for tensor in patch.tensors.values()})
    yield "tensors", f"{len(patch.tensors):,} ({_spans(dtypes)})"
    yield "file", f"{code_span(PATCH_NAME)}, {size(patch.nbytes)}"
    for share, change in (
        (patch.facts.captured, "the whole change"),
        (patch.facts.captured_scored, "the change of the scored tensors"),
    ):
        if share is not None:
            yield f"share of {change}", f"{percent(share)} of the squared difference"


def _lossless_facts(patch: LosslessPatch) -> Iterator[tuple[str, str]]:
    if patch.tuned.fingerprint:
        yield "fingerprint of the result", code_span(patch.tuned.fingerprint)
    yield "file", f"{code_span(PATCH_NAME)}, {size(patch.nbytes)}"
    names = [file.name for file in patch.forward.files] + [one.name for one in patch.forward.side]
    yield "files of the result", _spans(names)
    if patch.not_carried:
        yield "not carried", _spans(patch.not_carried)


def _spans(names: Sequence[str]) -> str:
    return ", ".join(code_span(name) for name in names[:_MAX_LISTED])


def _layers(found: LayerCounts, figure: str | None) -> str:
    largest = max(found.totals, default=0)
    kinds = [code_span(kind, 40) if kind is not None else "other" for kind in found.kinds]
    rows = [
        [_layer(first, last), f"{total:,}", text_bar(total, largest), *_cells(counts)]
        for (first, last), total, counts in zip(found.layers, found.totals, found.counts, strict=True)
    ]
    if len(rows) > 1:
        columns = [sum(column) for column in zip(*found.counts, strict=True)]
        rows.append(["all", f"{sum(columns):,}", "", *_cells(columns)])
    shown = f"![Percentage of each weight's neurons that the patch replaces]({figure})\n\n" if figure else ""
    right = [1, *range(3, 3 + len(kinds))]
    return f"## Where the neurons are\n\n{shown}{table(['layer', 'neurons', '', *kinds], rows, right=right)}"


def _cells(counts: Sequence[int]) -> list[str]:
    return [f"{count:,}" if count else "" for count in counts]


def _layer(first: str, last: str) -> str:
    if not first:
        return "outside the layers"
    if first == last:
        return code_span(first, 60)
    return f"{code_span(first, 60)} to {code_span(last.rpartition('.')[2])}"


def _selection_facts(patch: Patch) -> Iterator[tuple[str, str]]:
    for key, label in _SELECTION_LABELS.items():
        if (value := patch.facts.get(key)) not in (None, {}, []):
            yield label, _json_span(value)


def _training_facts(patch: Patch) -> Iterator[tuple[str, str]]:
    for key, value in list(patch.training.items())[:_MAX_LISTED]:
        if value is not None:
            yield code_span(key, 60), _json_span(value)


def _json_span(value: object) -> str:
    """Any JSON value as one code span."""
    if isinstance(value, dict) and len(value) == 1:  # {"neurons": "3%"}
        (key, one), *_ = value.items()
        value = f"{key} {one}" if isinstance(one, (str, int, float)) else value
    return code_span(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 300)


@dataclass(frozen=True)
class LayerCounts:
    """A patch's neurons by layer and kind of weight, without the bias elements that go with a neuron."""

    #: Kinds of weight, the one with most neurons first; ``None`` stands for all remaining kinds.
    kinds: Sequence[str | None]
    #: The first and the last layer of each row, in the model's order, such as ``"model.layers.3"``. They are
    #: equal if the row is one layer; ``""`` stands for tensors outside the layers.
    layers: Sequence[tuple[str, str]]
    counts: Sequence[Sequence[int]]  # neurons per layer and kind

    @classmethod
    def of_patch(cls, patch: Patch) -> LayerCounts:
        """Count a patch's neurons. The names of the tensors alone say which layer and kind they belong to."""
        found = LayerMap.of_patch(patch)
        used = np.flatnonzero(found.chosen.sum(axis=1))
        layers = [found.layers[row] for row in used]
        kinds, counts = _columns(found, found.chosen[used])
        rows = list(_rows(layers, counts))
        return cls(kinds, [(first, last) for first, last, _ in rows], [row for *_, row in rows])

    @property
    def totals(self) -> list[int]:
        """Neurons per layer."""
        return [sum(row) for row in self.counts]


def _columns(found: LayerMap, counts: Int64Array) -> tuple[list[str | None], Int64Array]:
    """The kinds with most neurons, and the counts of each and of all the others."""
    totals = counts.sum(axis=0)
    order = sorted(np.flatnonzero(totals), key=lambda kind: (-totals[kind], found.kinds[kind]))
    if len(order) <= _MAX_KINDS:
        return [found.kinds[kind] for kind in order], counts[:, order]
    order, others = order[: _MAX_KINDS - 1], order[_MAX_KINDS - 1 :]
    kept = np.column_stack([counts[:, order], counts[:, others].sum(axis=1)])
    return [*(found.kinds[kind] for kind in order), None], kept


def _rows(layers: Sequence[str], counts: Int64Array) -> Iterator[tuple[str, str, list[int]]]:
    """First layer, last layer and counts of each row: of one layer, or of neighbours in one stack."""
    size = -(-len(layers) // _MAX_LAYERS)
    for _, group in groupby(range(len(layers)), key=lambda row: layers[row].rpartition(".")[0]):
        stack = list(group)
        for start in range(0, len(stack), size):
            rows = stack[start : start + size]
            yield layers[rows[0]], layers[rows[-1]], counts[rows].sum(axis=0).tolist()


def code_span(value: object, longest: int = _MAX_LENGTH) -> str:
    """``value`` as a code span that it cannot leave, in any renderer.

    Nothing in a code span is a link, a tag or a formula. Characters that could end the span, and those
    that do not print (line ends, marks that change the direction of writing), are escaped: ``\\x60``.
    """
    text = str(value)
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    safe = "".join(c if c.isprintable() and c not in _SPECIAL else _escaped(c) for c in text)
    return f"`{safe}`" if safe.strip() else "`(empty)`"


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def link(text: str, address: str) -> str:
    """A link; the caller knows that ``text`` and ``address`` are safe."""
    return f"[{text}]({address})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """A table; columns in ``right`` are aligned right. Cells are Markdown already."""
    rule = "|".join("--:" if column in right else "---" for column in range(len(head)))
    return "\n".join([_line(head), f"|{rule}|", *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def text_bar(value: float, largest: float) -> str:
    """A bar in characters; at least one for a value above 0."""
    return "█" * max(1, round(_BAR_LENGTH * value / largest)) if value > 0 else ""
