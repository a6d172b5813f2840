"""The generated text of a model card: how to use the patch, where its neurons are, how they were chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from ..patch.patch import PATCH_NAME, Patch
from ..sources.hub_client import page
from ..text import percent, plural, size
from .base_model import BaseModel
from .layer_counts import LayerCounts
from .markdown import code_span, link, table, text_bar

__all__ = ["card_text"]

_PROJECT = "https://github.com/neftsurgery/neftsurgery"
_MAX_TRAINING_FACTS = 40
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


def card_text(patch: Patch, repo: str, base: BaseModel, figure: str | None) -> str:
    """The part of a card that `push` writes, in Markdown.

    Everything that comes from the patch's manifest or from names of tensors is a number, or stands in a
    code span that it cannot leave.
    """
    parts = [
        _lead(patch, base),
        _usage(repo, base),
        "## What is in it\n\n" + table(["", ""], list(_facts(patch, base))),
        _layers(LayerCounts.of_patch(patch), figure),
    ]
    if chosen := list(_selection_facts(patch)):
        parts.append("## How the neurons were chosen\n\n" + table(["", ""], chosen))
    if trained := list(_training_facts(patch)):
        parts.append("## How the neurons were trained\n\n" + table(["", ""], trained))
    return "\n\n".join(parts)


def _lead(patch: Patch, base: BaseModel) -> str:
    model = link(code_span(base.repo), page(base.repo)) if base.repo else "the model it was made from"
    return (
        f"A **neuron patch** for {model}: new values for {plural(patch.neurons, 'neuron')} of "
        f"{plural(len(patch.tensors), 'tensor')} ({patch.parameters:,} parameters, {size(patch.nbytes)}). "
        "Every other weight of the base stays the same, bit for bit."
    )


def _usage(repo: str, base: BaseModel) -> str:
    note = "" if base.repo else "`BASE` stands for the model that the patch was made from.\n\n"
    return f"""## How to use it

{note}```console
$ pip install neftsurgery
$ neftsurgery apply {base.argument} {repo} -o patched
$ neftsurgery verify patched {repo}
```

```python
import neftsurgery as ns

ns.apply("{base.argument}", "{repo}", out="patched/")
attached = ns.attach(model, "{repo}")  # or in a live torch model; attached.detach() takes it out
```

`apply` checks every vector that it replaces against its hash in the patch. It refuses another base before it
writes anything. `neftsurgery revert` takes the patch out again, bit for bit.
[What a patch is]({_PROJECT}/blob/main/docs/patch-format.md)."""


def _facts(patch: Patch, base: BaseModel) -> Iterator[tuple[str, str]]:
    if base.repo is not None:
        yield "base", link(code_span(base.repo), page(base.repo))
        yield "revision of the base", code_span(base.revision) if base.revision else "unknown"
    elif base.name:
        yield "local name of the base", code_span(base.name)
    if base.fingerprint:
        yield "fingerprint of the base", code_span(base.fingerprint)
    yield "neurons", f"{patch.neurons:,}"
    yield "parameters", f"{patch.parameters:,}"
    dtypes = sorted({tensor.info.dtype for tensor in patch.tensors.values()})
    yield "tensors", f"{len(patch.tensors):,} ({', '.join(code_span(dtype) for dtype in dtypes)})"
    yield "file", f"{code_span(PATCH_NAME)}, {size(patch.nbytes)}"
    for share, change in (
        (patch.facts.captured, "the whole change"),
        (patch.facts.captured_scored, "the change of the scored tensors"),
    ):
        if share is not None:
            yield f"share of {change}", f"{percent(share)} of the squared difference"
    yield "revert", "needs only the patch" if patch.reversible else "needs the base: `--base`"
    if created := patch.manifest.get("created_by"):
        yield "created by", code_span(created)


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
    for key, value in list(patch.training.items())[:_MAX_TRAINING_FACTS]:
        if value is not None:
            yield code_span(key, 60), _json_span(value)


def _json_span(value: object) -> str:
    """Any JSON value as one code span."""
    if isinstance(value, dict) and len(value) == 1:  # {"neurons": "3%"}
        (key, one), *_ = value.items()
        value = f"{key} {one}" if isinstance(one, (str, int, float)) else value
    return code_span(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 300)
