"""What is known of the model a patch was made from: its Hub id and revision, and its licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import MismatchError, NeftError, UsageError
from ..patch.patch import Patch
from ..sources.hub_client import client, hub_errors, page

__all__ = ["Base", "base_of", "is_repo", "licence_of"]

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w][\w./-]{0,199}", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, slots=True)
class Base:
    """A patch's base.

    Attributes
    ----------
    repo, revision:
        Its Hub id and revision, as far as they are known; both are checked to be such.
    name, fingerprint:
        As the manifest has them: anything at all.
    """

    repo: str | None
    revision: str | None
    name: object = None
    fingerprint: object = None

    @property
    def argument(self) -> str:
        """What to type for it on a command line: nothing that a shell would take apart."""
        if self.repo is None:
            return "BASE"
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def is_repo(text: object) -> bool:
    """Whether ``text`` is ``org/name``."""
    return isinstance(text, str) and _REPO.fullmatch(text) is not None


def base_of(patch: Patch, named: str | None) -> Base:
    """The base by the patch's manifest; where that is silent, by ``named``: ``org/name`` or ``org/name@rev``.

    Raises
    ------
    UsageError
        If ``named`` is no Hub id.
    MismatchError
        If the manifest names another one.
    """
    known = patch.base
    repo = known.get("repo") if is_repo(known.get("repo")) else None
    revision = known.get("revision") if repo is not None and _is_revision(known.get("revision")) else None
    if named is not None:
        given, at, given_revision = named.partition("@")
        if not is_repo(given) or (at and not _is_revision(given_revision)):
            raise UsageError(
                "--base is not a Hub id", file=named, hint="name it as org/name or org/name@revision"
            )
        if repo is not None and repo != given:
            raise MismatchError("the patch was made from another base", expected=repo, found=given)
        if revision is not None and given_revision and revision != given_revision:
            raise MismatchError(
                "the patch was made from another revision of its base",
                expected=revision,
                found=given_revision,
            )
        repo, revision = given, revision or given_revision or None
    return Base(repo, revision, known.get("name"), known.get("fingerprint"))


def _is_revision(text: object) -> bool:
    return isinstance(text, str) and _REVISION.fullmatch(text) is not None and ".." not in text


def licence_of(base: Base, *, required: bool) -> tuple[dict[str, str], str | None]:
    """What the base's card says of its licence, and a warning where it could not be read.

    Parameters
    ----------
    required:
        Raise what is wrong, for a base that the user has named.
    """
    if base.repo is None:
        return {}, None
    try:
        with hub_errors(base.argument):
            info = client().HfApi().model_info(base.repo, revision=base.revision)
    except NeftError as error:
        if required:
            raise
        return {}, f"the card names no licence: {error.what} ({base.argument}, the base)"
    data = info.card_data.to_dict() if info.card_data is not None else {}
    found = _licence(data, base.repo)
    return found, None if found else f"the card names no licence: {base.repo}, the base, names none"


def _licence(data: Mapping[str, Any], repo: str) -> dict[str, str]:
    found = {key: value for key in _LICENCE_KEYS if isinstance(value := data.get(key), str)}
    if not _LICENCE.fullmatch(found.get("license", "")):
        return {}
    address = found.get("license_link", "")
    if address and not address.startswith(("https://", "http://")):  # a file of the base's repository
        found["license_link"] = f"{page(repo)}/blob/main/{address}"
    return found
