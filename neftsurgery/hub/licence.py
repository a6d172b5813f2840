"""The licence of a base model, as its card on the Hub names it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import NeftError
from ..sources.hub_client import client, page
from ..sources.hub_errors import hub_errors
from .base_model import BaseModel

__all__ = ["read_licence"]

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
_KEYS = ("license", "license_name", "license_link")


def read_licence(base: BaseModel, *, required: bool) -> tuple[dict[str, str], str | None]:
    """The fields of the base's card that name its licence, and a warning if there are none.

    Parameters
    ----------
    required:
        Raise the error if the base cannot be read: for a base that the user has named.
    """
    if base.hub_id is None:
        return {}, None
    try:
        with hub_errors(base.hub_id):
            info = client().HfApi().model_info(base.hub_id.repo, revision=base.hub_id.revision)
    except NeftError as error:
        if required:
            raise
        return {}, f"the card names no licence: {error.what} ({base.hub_id}, the base)"
    data = info.card_data.to_dict() if info.card_data is not None else {}
    found = _licence(data, base.hub_id.repo)
    return found, None if found else f"the card names no licence: the base, {base.hub_id.repo}, names none"


def _licence(data: Mapping[str, object], repo: str) -> dict[str, str]:
    found = {key: value for key in _KEYS if isinstance(value := data.get(key), str)}
    if not _IDENTIFIER.fullmatch(found.get("license", "")):
        return {}
    link = found.get("license_link", "")
    if link and not link.startswith(("https://", "http://")):  # a file of the base's repository
        found["license_link"] = f"{page(repo)}/blob/main/{link}"
    return found
