"""The repository that a push goes to: the names of its files, its state, and one commit on top of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CorruptFileError, MachineError, MismatchError, NeftError
from ..sources.hub_client import client, fetch_file, find_file
from ..sources.hub_errors import hub_errors, redacted
from ..sources.hub_id import HubId, is_revision

Files = Mapping[str, Path | BinaryIO | bytes]

#: The files of a patch's repository, beside the patch.
CARD_NAME = "README.md"
FIGURE_NAME = "neurons.png"
MAIN = "main"
CARD_HINT = "correct it on the Hub, or write a new card with [[replace_card=True]]"


@dataclass(frozen=True)
class Repository:
    """A model repository of the Hub, at one commit."""

    repo: str  # org/name
    branch: str  # that is pushed to
    has_branch: bool = False  # the branch exists
    head: str | None = None  # of the branch, or of main if it does not exist; None: there is no repository
    private: bool = False
    files: Sequence[str] = ()  # their names at that commit

    @property
    def exists(self) -> bool:
        """Whether the repository exists."""
        return self.head is not None

    @property
    def needs_branch(self) -> bool:
        """Whether the branch must be created; a new repository has a main branch."""
        return not self.has_branch and self.branch != MAIN

    @property
    def hub_id(self) -> HubId:
        """The repository at the branch."""
        return HubId(self.repo, self.branch)

    def card(self) -> str | None:
        """Fetch its README; None if it has none."""
        if CARD_NAME not in self.files:
            return None
        content = fetch_file(HubId(self.repo, self.head), CARD_NAME).read_bytes()
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            what = "the README on the Hub is not UTF-8"
            raise MismatchError(what, file=self.repo, hint=CARD_HINT) from error


def read_repository(repo: str, branch: str) -> Repository:
    """Ask the Hub for a repository, which need not exist; a `MachineError` if there is no token."""
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
        head, files = _commit(info.sha), [file.rfilename for file in info.siblings or []]
    return Repository(repo, branch, has_branch, head, bool(info.private), files)


def send_commit(
    repository: Repository, files: Files, message: str, *, private: bool | None
) -> tuple[str, str]:
    """Add ``files`` in one commit on ``repository.head``; returns both, equal if all files were there."""
    api, repo, parent = client().HfApi(), repository.repo, repository.head
    created = []
    try:
        with hub_errors(repository.hub_id, doing="pushing to"):
            if parent is None:
                api.create_repo(repo, private=private)
                created.append("the repository")
                parent = _commit(api.model_info(repo).sha)
            if repository.needs_branch:
                api.create_branch(repo, branch=repository.branch, revision=parent, exist_ok=False)
                created.append(f"the branch {repository.branch}")
            return _send(repository, files, message, parent), parent
    except NeftError as error:
        if created:
            left = f"this push created {' and '.join(created)}"
            error.hint = "; ".join(filter(None, [error.hint, left]))
        raise


def _send(repository: Repository, files: Files, message: str, parent: str) -> str:
    api, repo, branch = client().HfApi(), repository.repo, repository.branch
    add = client().CommitOperationAdd
    operations = {name: add(name, content) for name, content in files.items()}
    # The client uploads large files before the commit: several at once in threads, for which Ctrl-C has
    # to wait. The figure, which is small, is uploaded on its own, so that only the patch is left.
    if FIGURE_NAME in operations:
        api.preupload_lfs_files(repo, [operations[FIGURE_NAME]], revision=branch, free_memory=False)
    try:
        done = api.create_commit(
            repo, [*operations.values()], commit_message=message, revision=branch, parent_commit=parent
        )
    except ValueError as error:
        _raise_if_card_refused(error, repo)
        raise
    if done.oid == parent:
        _require_files(HubId(repo, parent), operations.values())
    return _commit(done.oid)


def _commit(name: object) -> str:
    """A commit as an answer names it: shown to the user, and a part of addresses."""
    if not is_revision(name):
        raise CorruptFileError("the Hub names a commit that cannot be one", found=repr(name)[:80])
    return name


def _require_files(hub_id: HubId, operations: Iterable[Any]) -> None:
    """Compare the files of a commit with those that were to be sent: a Hub may only say that it has them."""
    for operation in operations:
        found = None
        with suppress(MismatchError):  # there is no such file
            found = find_file(hub_id, operation.path_in_repo)
        with operation.as_file() as content:
            if found is None or not found.is_content(content):
                raise MachineError(
                    f"the Hub made no commit, but its {operation.path_in_repo} is not the one that was sent",
                    file=str(hub_id),
                    hint="run the command again",
                )


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
