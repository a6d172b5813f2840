"""The repository that a push goes to: the names of its files, and its state before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import MachineError, MismatchError
from ..sources.hub_client import client, fetch_file
from ..sources.hub_errors import hub_errors
from ..sources.hub_id import HubId

__all__ = ["CARD_HINT", "CARD_NAME", "FIGURE_NAME", "MAIN", "Repository", "read_repository"]

#: The files of a patch's repository, beside the patch.
CARD_NAME = "README.md"
FIGURE_NAME = "neurons.png"
MAIN = "main"
CARD_HINT = "correct it on the Hub, or write a new card with [[replace_card=True]]"


@dataclass(frozen=True)
class Repository:
    """A model repository of the Hub, at one commit.

    Attributes
    ----------
    repo, branch:
        ``org/name``, and the branch that is pushed to.
    has_branch:
        Whether the branch exists.
    head:
        The parent of the next commit: the branch's head, or main's if the branch does not exist. None
        if the repository does not exist.
    private:
        Whether only its members see it.
    files:
        The names of its files at that commit.
    """

    repo: str
    branch: str
    has_branch: bool = False
    head: str | None = None
    private: bool = False
    files: Sequence[str] = ()

    @property
    def exists(self) -> bool:
        """Whether the repository exists."""
        return self.head is not None

    @property
    def hub_id(self) -> HubId:
        """The repository at the branch."""
        return HubId(self.repo, self.branch)

    def card(self) -> str | None:
        """Fetch its README; None if it has none.

        Raises
        ------
        MismatchError
            If the README is not UTF-8.
        """
        if CARD_NAME not in self.files:
            return None
        content = fetch_file(HubId(self.repo, self.head), CARD_NAME).read_bytes()
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MismatchError(
                "the README on the Hub is not UTF-8", file=self.repo, hint=CARD_HINT
            ) from error


def read_repository(repo: str, branch: str) -> Repository:
    """Ask the Hub for a repository, which need not exist.

    Raises
    ------
    UsageError
        If the Hub does not allow the name ``repo``.
    MachineError
        If no token is found, or the Hub refuses or cannot be reached.
    """
    hub = client()
    if hub.get_token() is None:
        raise MachineError(
            "not logged in to the Hub", file=repo, hint="log in with `hf auth login`, or set HF_TOKEN"
        )
    api = hub.HfApi()
    with hub_errors(HubId(repo, branch), doing="asking"):
        has_branch = True
        try:
            info = api.model_info(repo, revision=branch)
        except hub.errors.RevisionNotFoundError:
            info, has_branch = api.model_info(repo), False
        except hub.errors.RepositoryNotFoundError as error:
            if isinstance(error, hub.errors.GatedRepoError) or error.response.status_code != 404:
                raise
            return Repository(repo, branch)
    files = [file.rfilename for file in info.siblings or []]
    return Repository(repo, branch, has_branch, info.sha, bool(info.private), files)
