"""The generated text of a model card: how to use the patch, where its neurons are, how they were chosen.

Names and values come from files, which may be hostile: they stand in code spans that they cannot leave.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import groupby

import numpy as np

from ..patch.lossless import LosslessPatch
from ..patch.patch import Patch
from ..patch.patch_file import PATCH_NAME
from ..reporting.layer_map import LayerMap
from ..reporting.training_record import training_facts
from ..sources.hub_client import page
from ..sources.hub_id import HubId
from ..tensors.document import Facts
from ..text import commas, four_digits, percent, plural, size

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
#: Keys of the manifest's ``training`` that a reader of the card can use.
_TRAINING = ("data", "examples", "probe", "steps", "batch_size", "learning_rate", "schedule", "seed")
#: Characters that could end a code span or a table cell, or begin a tag or a comment.
_SPECIAL = "`|<>"
_MAX_LENGTH = 100
_BAR_LENGTH = 12


def card_text(patch: Patch | LosslessPatch, repo: str, base: HubId | None, figure: str | None) -> str:
    """The part of a card that `push` writes, in Markdown."""
    if isinstance(patch, LosslessPatch):
        template, words = "card_lossless.md", _lossless_words(patch)
    else:
        template, words = "card_neurons.md", _neuron_words(patch, figure)
    words |= {
        "model": link(code_span(base.repo), page(base.repo)) if base else "the model it was made from",
        "note": "" if base else "`BASE` stands for the model that the patch was made from.\n\n",
        "facts": table(["", ""], list(_facts(patch, base))),
        "size": size(patch.nbytes),
    }
    text = (files(__package__) / template).read_text(encoding="utf-8")
    return text.format(base=base or "BASE", repo=repo, project=_PROJECT, **words).rstrip()


def _neuron_words(patch: Patch, figure: str | None) -> dict[str, str]:
    """What fills the template of a patch's card."""
    captured, loss, worth = patch.facts.captured, _loss(patch.training), ""
    if captured is not None and captured < 1 and not patch.training:
        worth = f"\n\n**Partial: holds {percent(captured)} of the change.** "
        worth += "Base plus patch is not the fine-tune."
    worth += f"\n\nLoss on held-out examples: **{loss}**." if loss else ""
    facts = ((label, patch.facts.get(key)) for key, label in _SELECTION_LABELS.items())
    chosen = [(label, value) for label, value in facts if value not in ({}, [])]
    record = Facts({key: value for key, value in patch.training.items() if key in _TRAINING})
    records = ""
    for how, recorded in (("chosen", chosen), ("trained", training_facts(record))):
        if rows := [(name, _json_span(value)) for name, value in recorded if value is not None]:
            records += f"\n\n## How the neurons were {how}\n\n{table(['', ''], rows)}"
    layers = _layers(patch, figure)
    counts = {"what": patch.what, "parameters": commas(patch.parameters)}
    return {**counts, "worth": worth, "layers": layers, "records": records}


def _loss(training: Facts) -> str | None:
    """The loss on held-out examples before and after training, as far as both are recorded."""
    curve, after = training.get("curve"), training.number("dev_loss")
    first = Facts.from_json(curve[0] if isinstance(curve, list) and curve else None)
    before = first.number("dev_loss") if first.get("step") == 0 else None
    if before is None or after is None:
        return None
    return f"{four_digits(before)} before training, {four_digits(after)} after"


def _lossless_words(patch: LosslessPatch) -> dict[str, str]:
    """As `_neuron_words`."""
    rows = [
        [code_span(name, 80), percent(kind.changed / max(1, kind.elements)), size(kind.code)]
        for name, kind in list(patch.kinds().items())[:_MAX_LISTED]
    ]
    return {
        "tuned": f"{size(patch.forward.nbytes)} of weights in {plural(len(patch.forward.tensors), 'tensor')}",
        "changed": table(["kind of weight", "changed", "bytes"], rows, right=[1, 2]),
    }


def _facts(patch: Patch | LosslessPatch, base: HubId | None) -> Iterator[tuple[str, str]]:
    """The rows of a table: of the base, of the patch, and of what undoes and made it."""
    if base is not None:
        yield "base", link(code_span(base.repo), page(base.repo))
        yield "revision of the base", code_span(base.revision) if base.revision else "unknown"
    elif patch.base.name:
        yield "local name of the base", code_span(patch.base.name)
    if patch.base.fingerprint:
        yield "fingerprint of the base", code_span(patch.base.fingerprint)
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


def _layers(patch: Patch, figure: str | None) -> str:
    kinds, layers, counts = layer_counts(patch)
    largest = max(map(sum, counts), default=0)
    lines = [
        (_layer(*ends), text_bar(sum(row), largest), row) for ends, row in zip(layers, counts, strict=True)
    ]
    if len(lines) > 1:
        lines.append(("all", "", [sum(column) for column in zip(*counts, strict=True)]))
    rows = [
        [layer, f"{sum(row):,}", bar, *(f"{count:,}" if count else "" for count in row)]
        for layer, bar, row in lines
    ]
    shown = f"![Percentage of each weight's neurons that the patch replaces]({figure})\n\n" if figure else ""
    head = [code_span(kind, 40) if kind is not None else "other" for kind in kinds]
    right = [1, *range(3, 3 + len(head))]
    return f"{shown}{table(['layer', 'neurons', '', *head], rows, right=right)}"


def _layer(first: str, last: str) -> str:
    if not first:
        return "outside the layers"
    if first == last:
        return code_span(first, 60)
    return f"{code_span(first, 60)} to {code_span(last.rpartition('.')[2])}"


def _json_span(value: object) -> str:
    """Any JSON value as one code span."""
    if isinstance(value, dict) and len(value) == 1:  # {"neurons": "3%"}
        (key, one), *_ = value.items()
        value = f"{key} {one}" if isinstance(one, (str, int, float)) else value
    return code_span(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 300)


def layer_counts(patch: Patch) -> tuple[list[str | None], list[tuple[str, str]], list[list[int]]]:
    """A patch's neurons by kind of weight, the one with most first, None for all others; and by layer.

    A row is the first and the last of some layers, as of many, neighbours in one stack share one; "" is
    outside the layers. The counts are ``[rows][kinds]``, without bias elements that go with a neuron.
    """
    found = LayerMap.of_patch(patch)
    used, totals = np.flatnonzero(found.chosen.sum(axis=1)), found.chosen.sum(axis=0)
    order = sorted(np.flatnonzero(totals), key=lambda kind: (-totals[kind], found.kinds[kind]))
    shown = order if len(order) <= _MAX_KINDS else order[: _MAX_KINDS - 1]
    kinds: list[str | None] = [found.kinds[kind] for kind in shown]
    columns = [found.chosen[:, kind] for kind in shown]
    if len(shown) < len(order):
        kinds.append(None)
        columns.append(found.chosen[:, order[len(shown) :]].sum(axis=1))
    layers, counts, size = [], [], -(-len(used) // _MAX_LAYERS)
    for _, group in groupby(used, key=lambda row: found.layers[row].rpartition(".")[0]):
        stack = list(group)
        for rows in (stack[start : start + size] for start in range(0, len(stack), size)):
            layers.append((found.layers[rows[0]], found.layers[rows[-1]]))
            counts.append([int(column[rows].sum()) for column in columns])
    return kinds, layers, counts


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
    first, *lines = (f"| {' | '.join(cells)} |" for cells in [head, *rows])
    return "\n".join([first, f"|{rule}|", *lines])


def text_bar(value: float, largest: float) -> str:
    """A bar in characters; at least one for a value above 0."""
    return "█" * max(1, round(_BAR_LENGTH * value / largest)) if value > 0 else ""
