"""The generated text of the card of a lossless patch."""

from __future__ import annotations

from collections.abc import Iterator

from ..patch.lossless import LosslessPatch
from ..patch.patch import PATCH_NAME
from ..sources.hub_client import page
from ..text import percent, plural, size
from .base_model import BaseModel
from .card_text import base_facts, code_span, link, table

__all__ = ["lossless_card_text"]

_MAX_KINDS = 40


def lossless_card_text(patch: LosslessPatch, repo: str, base: BaseModel) -> str:
    """The part of a card that `push` writes, in Markdown; names from the patch stand in code spans."""
    model = link(code_span(base.repo), page(base.repo)) if base.repo else "the model it was made from"
    note = "" if base.repo else "`BASE` stands for the model that the patch was made from.\n\n"
    rows = [
        [code_span(name, 80), percent(kind.changed / max(1, kind.elements)), size(kind.code)]
        for name, kind in list(patch.kinds().items())[:_MAX_KINDS]
    ]
    tuned = f"{size(patch.forward.nbytes)} of weights in {plural(len(patch.forward.tensors), 'tensor')}"
    return "\n\n".join(
        [
            f"A **lossless patch** for {model}: the base plus these {size(patch.nbytes)} is the full "
            f"fine-tune, to the bit ({tuned}).",
            f"## How to use it\n\n{note}```console\n$ neftsurgery apply {base.argument} {repo} -o tuned\n"
            f"$ neftsurgery verify tuned {repo}\n```\n\n`apply` checks every block of the base and of the "
            "result against its hash. It refuses another base before it writes anything.",
            "## What is in it\n\n" + table(["", ""], list(_facts(patch, base))),
            "## What changed\n\n" + table(["kind of weight", "changed", "bytes"], rows, right=[1, 2]),
        ]
    )


def _facts(patch: LosslessPatch, base: BaseModel) -> Iterator[tuple[str, str]]:
    yield from base_facts(base)
    if patch.tuned.fingerprint:
        yield "fingerprint of the result", code_span(patch.tuned.fingerprint)
    yield "file", f"{code_span(PATCH_NAME)}, {size(patch.nbytes)}"
    names = [file.name for file in patch.forward.files] + [one.name for one in patch.forward.side]
    yield "files of the result", ", ".join(code_span(name) for name in names[:_MAX_KINDS])
    if patch.not_carried:
        yield "not carried", ", ".join(code_span(name) for name in patch.not_carried[:_MAX_KINDS])
    yield "revert", "needs only the patch" if patch.reversible else "needs the base: `--base`"
    if created := patch.manifest.get("created_by"):
        yield "created by", code_span(created)
