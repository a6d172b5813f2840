"""The base model of a patch: its Hub id, where that is known, and its licence, as its card names it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..errors import MismatchError, NeftError, UsageError
from ..patch.lossless import LosslessPatch
from ..patch.patch import Patch
from ..sources.hub_client import client, fetch_file, page
from ..sources.hub_errors import hub_errors
from ..sources.hub_id import HubId, is_repo, is_revision
from .repository import CARD_NAME

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
_MAX_CARD = 2**20
_LICENCE_KEYS = ("license", "license_name", "license_link")


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
