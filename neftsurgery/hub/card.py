"""The model card of a patch: front matter that the Hub understands, and a text for people."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import MismatchError
from ..patch.patch import Patch
from ..sources.hub_client import client
from .base_model import Base
from .card_text import LOSS, dev_loss, story

__all__ = ["BEGIN", "END", "write_card"]

#: What stands between these is written anew by every push; everything else of a card is its owner's.
BEGIN = "<!-- neftsurgery:begin, written by `neftsurgery push`: what you change here is overwritten -->"
END = "<!-- neftsurgery:end, what you write below or above is kept -->"

_MARKED = re.compile(r"<!-- neftsurgery:begin\b.*?-->.*?<!-- neftsurgery:end\b.*?-->", re.DOTALL)
_MARK = re.compile(r"<!-- neftsurgery:(begin|end)\b")
_TAGS = ["neftsurgery", "neuron-patch", "neft"]
_LIBRARY = "neftsurgery"


def write_card(
    patch: Patch,
    repo: str,
    base: Base,
    licence: Mapping[str, str],
    *,
    picture: str | None = None,
    existing: str | None = None,
) -> str:
    """The README of a patch's repository.

    Parameters
    ----------
    licence:
        The front matter's ``license``, ``license_name`` and ``license_link``, as far as they are known.
    picture:
        The name of a picture of where the neurons lie, beside the card.
    existing:
        The card that is there. Its text stays, but for what an earlier push wrote; of its front matter
        everything stays that is not about the base.

    Raises
    ------
    MismatchError
        If ``existing`` is no card, or it cannot be told what of it an earlier push wrote.
    """
    block = f"{BEGIN}\n\n{story(patch, repo, base, picture)}\n\n{END}"
    hub = client()
    if existing is None:
        found = _front_matter(patch, repo, base, licence, {}, [])
        front = hub.ModelCardData(**found).to_yaml(original_order=list(found))
        return str(hub.ModelCard(f"---\n{front}\n---\n\n# {repo.partition('/')[2]}\n\n{block}\n"))
    card = _read(existing, repo)
    kept = [result for result in card.data.get("eval_results") or [] if result.metric_name != LOSS]
    for key, value in _front_matter(patch, repo, base, licence, card.data.to_dict(), kept).items():
        card.data[key] = value
    card.text = _with_block(card.text, block, repo)
    return str(card)


def _read(text: str, repo: str) -> Any:
    """A card of huggingface_hub."""
    import yaml

    try:
        return client().ModelCard(text)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise MismatchError(
            f"the README there has front matter that cannot be read ({type(error).__name__})",
            file=repo,
            hint="correct it on the Hub, or write a new card over it with --replace-card",
        ) from error


def _with_block(text: str, block: str, repo: str) -> str:
    marks = _MARK.findall(text)
    if not marks:
        return f"{text.rstrip()}\n\n{block}\n" if text.strip() else f"\n{block}\n"
    if marks != ["begin", "end"]:
        raise MismatchError(
            "the README there has lost one of the marks around what an earlier push wrote",
            file=repo,
            expected="one neftsurgery:begin and one neftsurgery:end",
            found=", ".join(marks),
            hint="correct it on the Hub, or write a new card over it with --replace-card",
        )
    return _MARKED.sub(lambda _: block, text, count=1)


def _front_matter(
    patch: Patch,
    repo: str,
    base: Base,
    licence: Mapping[str, str],
    known: Mapping[str, Any],
    kept: list[Any],
) -> dict[str, Any]:
    """What a push says in the front matter, beside what is ``known`` there already."""
    found: dict[str, Any] = {}
    if base.repo is not None:
        found |= {"base_model": base.repo, "base_model_relation": "adapter"}
    found["library_name"] = _LIBRARY
    if not known.get("license"):
        found |= licence
    tags = known.get("tags")
    tags = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    found["tags"] = list(dict.fromkeys([*tags, *_TAGS]))
    if (loss := dev_loss(patch)) is not None:
        result = client().EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name="development split of the training data",
            metric_type="loss",
            metric_name=LOSS,
            metric_value=loss,
        )
        found |= {"model_name": repo.partition("/")[2], "eval_results": [*kept, result]}
    elif known.get("model-index"):  # an earlier push may have told of a loss that this patch has not
        found |= {"eval_results": kept} if kept else {"eval_results": None, "model_name": None}
    return found
