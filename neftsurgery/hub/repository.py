"""The repository that is pushed to, as it is before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import MachineError, MismatchError
from ..sources.hub_client import client, fetch_file, hub_errors

__all__ = ["MAIN", "Remote", "read_remote"]

MAIN = "main"
_CARD = "README.md"


@dataclass(frozen=True)
class Remote:
    """A model repository of the Hub.

    Attributes
    ----------
    repo, branch:
        Which.
    exists, has_branch:
        Whether they are there yet.
    head:
        The commit a new one goes on top of: the branch's, or that of main for a branch yet to be made.
        None for a repository yet to be made.
    private:
        Whether only its members see it.
    files:
        What is in it at that commit.
    """

    repo: str
    branch: str
    exists: bool = False
    has_branch: bool = False
    head: str | None = None
    private: bool = False
    files: Sequence[str] = ()

    def card(self) -> str | None:
        """Its README, as it is there.

        Raises
        ------
        MismatchError
            If it is no text.
        """
        if self.head is None or _CARD not in self.files:
            return None
        content = fetch_file(f"{self.repo}@{self.head}", _CARD).read_bytes()
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MismatchError(
                "the README there is not UTF-8",
                file=self.repo,
                hint="correct it on the Hub, or write a new card over it with --replace-card",
            ) from error


def read_remote(repo: str, branch: str) -> Remote:
    """Ask the Hub what is there.

    Raises
    ------
    UsageError
        If ``repo`` is no name that the Hub takes.
    MachineError
        If nobody is logged in, or the Hub refuses or cannot be reached.
    """
    hub = client()
    if hub.get_token() is None:
        raise MachineError(
            "nobody is logged in to the Hub here",
            file=repo,
            hint="log in with `hf auth login`, or set HF_TOKEN",
        )
    api = hub.HfApi()
    with hub_errors(f"{repo}@{branch}", doing="asking"):
        try:
            info = api.model_info(repo, revision=branch)
            return Remote(repo, branch, True, True, info.sha, bool(info.private), _names(info))
        except hub.errors.RevisionNotFoundError:
            info = api.model_info(repo)
            return Remote(repo, branch, True, False, info.sha, bool(info.private), _names(info))
        except hub.errors.GatedRepoError:
            raise
        except hub.errors.RepositoryNotFoundError as error:
            if error.response.status_code != 404:
                raise
            return Remote(repo, branch)


def _names(info: object) -> list[str]:
    return [sibling.rfilename for sibling in getattr(info, "siblings", None) or []]
