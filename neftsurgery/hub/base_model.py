"""The base model of a patch: its Hub id, where that is known."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import MismatchError, UsageError
from ..patch.patch import Patch
from ..sources.hub_id import HubId, is_repo, is_revision

__all__ = ["BaseModel"]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model that a patch was made from.

    Attributes
    ----------
    hub_id:
        Its Hub id; None where that is not known. Both parts are checked to be of the right form.
    name, fingerprint:
        As the manifest has them.
    """

    hub_id: HubId | None
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
    def of(cls, patch: Patch, named: str | None) -> BaseModel:
        """The base that the patch's manifest names, completed by ``named``: ``org/name[@revision]``.

        Raises
        ------
        UsageError
            If ``named`` is not a Hub id.
        MismatchError
            If the manifest names another base or another revision.
        """
        origin, hub_id = patch.base, None
        if is_repo(origin.repo):
            hub_id = HubId(origin.repo, origin.revision if is_revision(origin.revision) else None)
        hub_id = hub_id if named is None else _completed(hub_id, named)
        return cls(hub_id, origin.name, origin.fingerprint)


def _completed(known: HubId | None, named: str) -> HubId:
    given = HubId.split(named)
    if not is_repo(given.repo) or ("@" in named and not is_revision(given.revision)):
        raise UsageError(
            "[[base]] is not a Hub id", file=named, hint="name it as org/name or org/name@revision"
        )
    if known is None:
        return given
    if known.repo != given.repo:
        raise MismatchError("the patch was made from another base", expected=known.repo, found=given.repo)
    if known.revision and given.revision and known.revision != given.revision:
        raise MismatchError(
            "the patch was made from another revision of its base",
            expected=known.revision,
            found=given.revision,
        )
    return known if known.revision else given
