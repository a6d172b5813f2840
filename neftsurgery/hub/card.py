"""The model card of a patch: front matter for the Hub with the base and its licence, a text, and a figure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from ..errors import MismatchError, NeftError, UsageError
from ..patch.lossless import LosslessPatch
from ..patch.patch import Patch
from ..reporting.layer_map import LayerMap, layer_map_figure
from ..sources.hub_client import client, fetch_file, page
from ..sources.hub_errors import hub_errors
from ..sources.hub_id import HubId, is_repo, is_revision
from .card_text import card_text
from .repository import CARD_HINT, CARD_NAME

#: Every push rewrites what is between these marks; the rest of a card belongs to its owner.
BEGIN = "<!-- neftsurgery:begin, `neftsurgery push` overwrites the text up to the end mark -->"
END = "<!-- neftsurgery:end: text outside the two marks is kept -->"

_MARKED = re.compile(r"<!-- neftsurgery:begin\b.*?-->.*?<!-- neftsurgery:end\b.*?-->", re.DOTALL)
_MARK = re.compile(r"<!-- neftsurgery:(begin|end)\b")
_TAGS = ["neftsurgery", "neuron-patch", "neft"]
_LOSSLESS_TAGS = ["neftsurgery", "lossless-patch"]
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
_MAX_CARD = 2**20
_LICENCE_KEYS = ("license", "license_name", "license_link")
#: Tells the result that holds the recorded loss from those of the card's owner.
_LOSS = "loss on held-out examples"


def write_card(
    patch: Patch | LosslessPatch,
    repo: str,
    base: HubId | None,
    licence: Mapping[str, str],
    *,
    figure: str | None = None,
    existing: str | None = None,
) -> str:
    """The README of a patch's repository; of a valid ``existing`` one, what no earlier push wrote is kept."""
    block = f"{BEGIN}\n\n{card_text(patch, repo, base, figure)}\n\n{END}"
    hub = client()
    if existing is None:
        found = _front_matter(patch, repo, base, licence, {}, [])
        front = hub.ModelCardData(**found).to_yaml(original_order=list(found))
        return str(hub.ModelCard(f"---\n{front}\n---\n\n# {repo.partition('/')[2]}\n\n{block}\n"))
    card = _read(existing, repo)
    kept = [result for result in card.data.get("eval_results") or [] if result.metric_name != _LOSS]
    for key, value in _front_matter(patch, repo, base, licence, card.data.to_dict(), kept).items():
        card.data[key] = value
    card.text = _with_block(card.text, block, repo)
    return str(card)


def card_figure(patch: Patch) -> bytes | None:
    """A map of the neurons that the patch replaces, as PNG; None without matplotlib or without neurons."""
    found = LayerMap.of_patch(patch)
    if find_spec("matplotlib") is None or not found.neurons:
        return None
    return layer_map_figure(found, word="replaced", of_patch=True).png()


def _read(text: str, repo: str) -> Any:
    import yaml

    try:
        return client().ModelCard(text)
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise MismatchError(
            f"the front matter of the README on the Hub cannot be read ({type(error).__name__})",
            file=repo,
            hint=CARD_HINT,
        ) from error


def _with_block(text: str, block: str, repo: str) -> str:
    """``text`` with ``block`` in place of the marked part; at the end if there is none."""
    marks = _MARK.findall(text)
    if not marks:
        return f"{text.rstrip()}\n\n{block}\n" if text.strip() else f"\n{block}\n"
    if marks != ["begin", "end"]:
        raise MismatchError(
            "the marks around the generated part of the README on the Hub are incomplete",
            file=repo,
            expected="one neftsurgery:begin, then one neftsurgery:end",
            found=", ".join(marks),
            hint=CARD_HINT,
        )
    return _MARKED.sub(lambda _: block, text, count=1)


def _front_matter(
    patch: Patch | LosslessPatch,
    repo: str,
    base: HubId | None,
    licence: Mapping[str, str],
    known: Mapping[str, Any],
    kept: Sequence[object],
) -> dict[str, Any]:
    """The fields that a push writes, given those that the card has (``known``) and the results to keep."""
    found: dict[str, Any] = {}
    if base is not None:
        relation = "adapter" if isinstance(patch, Patch) else "finetune"
        found |= {"base_model": base.repo, "base_model_relation": relation}
    found["library_name"] = "neftsurgery"
    if not known.get("license"):
        found |= licence
    tags, ours = known.get("tags"), _TAGS if isinstance(patch, Patch) else _LOSSLESS_TAGS
    others = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    others = [tag for tag in others if tag not in {*_TAGS, *_LOSSLESS_TAGS}]
    found["tags"] = list(dict.fromkeys([*others, *ours]))
    loss = patch.training.number("dev_loss") if isinstance(patch, Patch) else None
    if loss is not None:
        result = client().EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name="development split of the training data",
            metric_type="loss",
            metric_name=_LOSS,
            metric_value=loss,
        )
        found |= {"model_name": repo.partition("/")[2], "eval_results": [*kept, result]}
    elif known.get("model-index"):  # an earlier push may have written a loss that this patch does not have
        found |= {"eval_results": list(kept)} if kept else {"eval_results": None, "model_name": None}
    return found


def base_of(patch: Patch | LosslessPatch, named: str | None) -> HubId | None:
    """The base that the manifest names, completed by ``named``: ``org/name[@revision]`` that fits it."""
    origin, known = patch.base, None
    if is_repo(origin.repo):
        known = HubId(origin.repo, origin.revision if is_revision(origin.revision) else None)
    return known if named is None else _completed(known, named)


def _completed(known: HubId | None, named: str) -> HubId:
    given = HubId.parse(named)
    if given is None:
        raise UsageError(
            "[[base]] is not a Hub id", file=named, hint="name it as org/name or org/name@revision"
        )
    if known is None:
        return given
    if known.repo != given.repo:
        raise MismatchError("the patch was made from another base", expected=known.repo, found=given.repo)
    if known.revision and given.revision and known.revision != given.revision:
        what = "the patch was made from another revision of its base"
        raise MismatchError(what, expected=known.revision, found=given.revision)
    return known if known.revision else given


def read_licence(base: HubId | None, *, required: bool) -> tuple[dict[str, str], str | None]:
    """The licence fields of the base's card, or a warning; ``required``: not to read it is an error."""
    if base is None:
        return {}, None
    try:
        with hub_errors(base):
            info = client().HfApi().model_info(base.repo, revision=base.revision)
            data = _card_data(base.repo, info)
    except NeftError as error:
        if required:
            raise
        return {}, f"the card names no licence: {error.what} ({base}, the base)"
    found = _licence(data, base.repo)
    return found, None if found else f"the card names no licence: the base, {base.repo}, names none"


def _card_data(repo: str, info: Any) -> dict[str, object]:
    """The front matter of a card: from the API or, as not every Hub sends it there, from the README."""
    import yaml

    if info.card_data is not None:
        return dict(info.card_data.to_dict())
    if CARD_NAME in [file.rfilename for file in info.siblings or []]:
        readme = fetch_file(HubId(repo, info.sha), CARD_NAME)
        with suppress(ValueError, RecursionError, yaml.YAMLError):  # it is not a card
            return client().metadata_load(readme) or {} if readme.stat().st_size <= _MAX_CARD else {}
    return {}


def _licence(data: Mapping[str, object], repo: str) -> dict[str, str]:
    found = {key: value for key in _LICENCE_KEYS if isinstance(value := data.get(key), str)}
    if not _LICENCE.fullmatch(found.get("license", "")):
        return {}
    link = found.get("license_link", "")
    if link and not link.startswith(("https://", "http://")):  # a file of the base's repository
        found["license_link"] = f"{page(repo)}/blob/main/{link}"
    return found
