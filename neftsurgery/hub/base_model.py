"""The base model of a patch: its Hub id, where that is known, and its licence, as its card names it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model that a patch was made from; name and fingerprint are as the manifest has them."""

    hub_id: HubId | None  # where it is known; both parts are of the right form
    name: str | None = None
    fingerprint: str | None = None

    @property
    def repo(self) -> str | None:
        """``org/name``, where it is known."""
        return None if self.hub_id is None else self.hub_id.repo

    @property
    def revision(self) -> str | None:
        """The revision, where it is known."""
        return None if self.hub_id is None else self.hub_id.revision

    @property
    def argument(self) -> str:
        """What to type for it on a command line; safe to paste into a shell."""
        return "BASE" if self.hub_id is None else str(self.hub_id)

    @classmethod
    def of(cls, patch: Patch | LosslessPatch, named: str | None) -> BaseModel:
        """The base that the manifest names, completed by ``named``: ``org/name[@revision]`` that fits it."""
        origin, hub_id = patch.base, None
        if is_repo(origin.repo):
            hub_id = HubId(origin.repo, origin.revision if is_revision(origin.revision) else None)
        hub_id = hub_id if named is None else _completed(hub_id, named)
        return cls(hub_id, origin.name, origin.fingerprint)


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


def read_licence(base: BaseModel, *, required: bool) -> tuple[dict[str, str], str | None]:
    """The licence fields of the base's card, or a warning; ``required``: not to read it is an error."""
    if base.hub_id is None:
        return {}, None
    try:
        with hub_errors(base.hub_id):
            info = client().HfApi().model_info(base.hub_id.repo, revision=base.hub_id.revision)
            data = _card_data(base.hub_id.repo, info)
    except NeftError as error:
        if required:
            raise
        return {}, f"the card names no licence: {error.what} ({base.hub_id}, the base)"
    found = _licence(data, base.hub_id.repo)
    return found, None if found else f"the card names no licence: the base, {base.hub_id.repo}, names none"


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
