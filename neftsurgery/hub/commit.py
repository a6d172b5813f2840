"""One commit of a repository of the Hub; a repository or branch that does not exist is created."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from ..errors import MismatchError, NeftError
from ..sources.hub_client import client
from ..sources.hub_errors import hub_errors
from ..sources.secrets import redacted
from .repository import CARD_HINT, CARD_NAME, FIGURE_NAME, MAIN, Repository

__all__ = ["Files", "send_commit"]

Files = Mapping[str, Path | BinaryIO | bytes]
_LEFT_EMPTY = "the repository was created, and is still empty"


def send_commit(
    repository: Repository,
    files: Files,
    message: str,
    *,
    private: bool | None,
) -> tuple[str, str]:
    """Add ``files`` to a repository in one commit on top of ``repository.head``, all or nothing.

    Parameters
    ----------
    private:
        Whether a new repository is private; None: as the user's settings on the Hub say.

    Returns
    -------
    tuple of str
        The branch's commit, and the one before. They are equal if all files were there already.
    """
    api, repo, branch = client().HfApi(), repository.repo, repository.branch
    with hub_errors(repository.hub_id, doing="pushing to"):
        parent = repository.head
        if parent is None:
            api.create_repo(repo, private=private)
            parent = api.model_info(repo).sha
    try:
        with hub_errors(repository.hub_id, doing="pushing to"):
            if not repository.has_branch and branch != MAIN:
                api.create_branch(repo, branch=branch, revision=parent, exist_ok=False)
            return _send(repository, files, message, parent), parent
    except NeftError as error:
        if not repository.exists:
            error.hint = "; ".join(filter(None, [error.hint, _LEFT_EMPTY]))
        raise


def _send(repository: Repository, files: Files, message: str, parent: str) -> str:
    """The commit."""
    api, repo, branch = client().HfApi(), repository.repo, repository.branch
    add = client().CommitOperationAdd
    operations = {name: add(name, content) for name, content in files.items()}
    # The client uploads large files before the commit: several at once in threads, for which Ctrl-C has
    # to wait. The figure, which is small, is uploaded on its own, so that only the patch is left.
    if FIGURE_NAME in operations:
        api.preupload_lfs_files(repo, [operations[FIGURE_NAME]], revision=branch, free_memory=False)
    try:
        done = api.create_commit(
            repo,
            operations=list(operations.values()),
            commit_message=message,
            revision=branch,
            parent_commit=parent,
        )
    except ValueError as error:
        _raise_if_card_refused(error, repo)
        raise
    return str(done.oid)


def _raise_if_card_refused(error: ValueError, repo: str) -> None:
    """The client has the Hub check the front matter before it sends anything, and raises the Hub's answer."""
    text = str(error)
    if isinstance(error, client().errors.HfHubHTTPError) or CARD_NAME not in text:
        return
    reasons = "; ".join(line.lstrip("- ") for line in text.splitlines()[1:] if line.strip())
    raise MismatchError(
        f"the Hub refused the front matter of the card: {redacted(reasons)[:200] or 'no reason given'}",
        file=repo,
        hint=CARD_HINT,
    ) from error
