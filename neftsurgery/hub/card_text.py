"""What a model card tells of a patch: how to use it, where its neurons lie, how they came about."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from ..patch.patch import PATCH_NAME, Patch
from ..sources.hub_client import page
from ..text import percent, plural, size
from .base_model import Base
from .markdown import bar, code, link, table
from .layer_counts import Places, places_of

__all__ = ["LOSS", "dev_loss", "story"]

#: What the front matter calls the loss that a training recorded.
LOSS = "loss on held-out examples"

_PROJECT = "https://github.com/neftsurgery/neftsurgery"
_MOST_FACTS = 40
_CHOSEN = {
    "score": "score",
    "anatomy": "what counts as a neuron",
    "policy": "policy",
    "budget": "budget",
    "per": "pools",
    "max_per_tensor": "at most, of one tensor",
    "seed": "seed",
    "merged": "merged from",
}


def story(patch: Patch, repo: str, base: Base, picture: str | None) -> str:
    """The part of a card that `push` writes, in Markdown.

    Everything that comes from the patch's manifest or from names of tensors stands in code spans that
    it cannot leave, or is a number.
    """
    parts = [
        _lead(patch, base),
        _use(repo, base),
        "## What is in it\n\n" + "\n".join(table(["", ""], list(_facts(patch, base)))),
        _where(places_of(patch), picture),
    ]
    if chosen := list(_chosen(patch)):
        parts.append("## How its neurons were chosen\n\n" + "\n".join(table(["", ""], chosen)))
    if trained := list(_trained(patch)):
        parts.append("## How they were trained\n\n" + "\n".join(table(["", ""], trained)))
    return "\n\n".join(parts)


def dev_loss(patch: Patch) -> float | None:
    """The loss on held-out examples that the patch's training recorded."""
    found = _training(patch).get("dev_loss")
    return float(found) if _is_number(found) else None


def _lead(patch: Patch, base: Base) -> str:
    model = link(code(base.repo), page(base.repo)) if base.repo else "the model it was made from"
    return (
        f"A **neuron patch** for {model}: new values for {plural(patch.neurons, 'neuron')} of "
        f"{plural(len(patch.tensors), 'tensor')}, {patch.parameters:,} parameters in {size(patch.nbytes)}. "
        "Every other weight of the base stays as it is, bit for bit."
    )


def _use(repo: str, base: Base) -> str:
    note = "" if base.repo else "`BASE` stands for the model the patch was made from.\n\n"
    return f"""## How to use it

{note}```console
$ pip install neftsurgery
$ neftsurgery apply {base.argument} {repo} -o patched
$ neftsurgery verify patched {repo}
```

```python
import neftsurgery as ns

ns.apply("{base.argument}", "{repo}", out="patched/")
attached = ns.attach(model, "{repo}")  # or on a live torch model; attached.detach() takes it off
```

`apply` compares every vector that it replaces with its hash in the patch: it refuses another base before it
writes anything. `neftsurgery revert` takes the patch out again, bit for bit.
[What a patch is]({_PROJECT}/blob/main/docs/patch-format.md)."""


def _facts(patch: Patch, base: Base) -> Iterator[tuple[str, str]]:
    if base.repo is not None:
        yield "base", link(code(base.repo), page(base.repo))
        yield "revision of the base", code(base.revision) if base.revision else "not known"
    elif base.name:
        yield "base, by its local name", code(base.name)
    if base.fingerprint:
        yield "fingerprint of the base", code(base.fingerprint)
    yield "neurons", f"{patch.neurons:,}"
    yield "parameters", f"{patch.parameters:,}"
    dtypes = sorted({tensor.info.dtype for tensor in patch.tensors.values()})
    yield "tensors", f"{len(patch.tensors):,} ({', '.join(code(dtype) for dtype in dtypes)})"
    yield "file", f"{code(PATCH_NAME)}, {size(patch.nbytes)}"
    for key, of in (
        ("captured", "the whole change"),
        ("captured_scored", "the change of the scored tensors"),
    ):
        if _is_number(share := patch.facts.get(key)):
            yield f"share of {of}", f"{percent(share)}: the squared difference that these neurons hold"
    yield "revert", "with the patch alone" if patch.reversible else "with the base: `--base`"
    if created := patch.manifest.get("created_by"):
        yield "made by", code(created)


def _where(places: Places, picture: str | None) -> str:
    most = max(places.totals, default=0)
    kinds = [code(kind, 40) if kind is not None else "other" for kind in places.kinds]
    rows = [
        [_layer(first, last), f"{total:,}", bar(total, most), *_cells(counts)]
        for (first, last), total, counts in zip(places.layers, places.totals, places.counts, strict=True)
    ]
    if len(rows) > 1:
        columns = [sum(column) for column in zip(*places.counts, strict=True)]
        rows.append(["all", f"{sum(columns):,}", "", *_cells(columns)])
    shown = f"![Of each weight's neurons, the percentage that is replaced]({picture})\n\n" if picture else ""
    right = [1, *range(3, 3 + len(kinds))]
    return f"## Where its neurons lie\n\n{shown}" + "\n".join(
        table(["layer", "neurons", "", *kinds], rows, right=right)
    )


def _cells(counts: Sequence[int]) -> list[str]:
    return [f"{count:,}" if count else "" for count in counts]


def _layer(first: str, last: str) -> str:
    if not first:
        return "outside the layers"
    if first == last:
        return code(first, 60)
    return f"{code(first, 60)} to {code(last.rpartition('.')[2])}"


def _chosen(patch: Patch) -> Iterator[tuple[str, str]]:
    for key, name in _CHOSEN.items():
        if (value := patch.facts.get(key)) not in (None, {}, []):
            yield name, _value(value)


def _trained(patch: Patch) -> Iterator[tuple[str, str]]:
    for key, value in list(_training(patch).items())[:_MOST_FACTS]:
        if value is not None:
            yield code(key, 60), _value(value)


def _training(patch: Patch) -> Mapping[str, Any]:
    found = patch.manifest.get("training")
    return found if isinstance(found, dict) else {}


def _value(value: Any) -> str:
    """Any JSON, as one code span."""
    if isinstance(value, dict) and len(value) == 1:  # {"neurons": "3%"}
        (key, one), *_ = value.items()
        value = f"{key} {one}" if isinstance(one, (str, int, float)) else value
    return code(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 300)


def _is_number(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)
