"""push: a patch and its card, in one commit of a repository of the Hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import MachineError, MismatchError, NeftError, UsageError, boundary
from ..patch.patch import PATCH_NAME, Patch
from ..progress import Progress, silent
from ..sources.hub_client import client, hub_errors, page
from ..sources.secrets import redacted
from ..surgery.merge_plan import check_patches
from .base_model import Base, base_of, is_repo, licence_of
from .card import write_card
from .card_figure import PICTURE_NAME, picture_of
from .repository import MAIN, Remote, read_remote

__all__ = ["Push", "Pushed", "plan_push", "push", "send"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Push:
    """A planned push: everything is checked, nothing is sent.

    Attributes
    ----------
    patch, base:
        What is pushed, and what is known of the model it was made from.
    remote:
        Where to, as it is now.
    private:
        Whether a repository that has to be made is private; None: as the Hub's settings say.
    message:
        Of the commit.
    card:
        The README.
    picture:
        PNG, where there was something to draw it with.
    warnings:
        Sentences for the user.
    """

    patch: Patch
    base: Base
    remote: Remote
    private: bool | None
    message: str
    card: str
    picture: bytes | None
    warnings: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        """The names of what is sent."""
        return [PATCH_NAME, "README.md", *([PICTURE_NAME] if self.picture else [])]


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did.

    Attributes
    ----------
    repo, branch, commit:
        Where the patch is now; pull it as ``repo@commit``.
    url:
        The repository's page.
    created:
        Whether the repository was made.
    changed:
        Whether there is a new commit: there is none if all was there already.
    card:
        The README.
    """

    repo: str
    branch: str
    commit: str
    url: str
    created: bool
    changed: bool
    card: str


@boundary
def push(
    patch: Patch | str | os.PathLike[str],
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    base: str | None = None,
    parent: str | None = None,
    replace_card: bool = False,
    progress: Progress = silent,
) -> Pushed:
    """Publish a patch on the Hugging Face Hub, with a model card: one commit, whole or not at all.

    The token is the one that huggingface_hub finds (``HF_TOKEN``, or ``hf auth login``).

    Parameters
    ----------
    patch:
        A patch, its file, or the Hub id of another repository.
    repo:
        ``org/name``. Made if it is not there.
    private:
        Make it private. A public repository that is there already is then refused.
    revision:
        A branch; made from main's head if it is not there. Default: main.
    message:
        Of the commit.
    base:
        ``org/name`` or ``org/name@revision`` of the base, where the patch does not know it.
    parent:
        The commit that the branch must be at: what you looked at last.
    replace_card:
        Write the card anew. Otherwise only the part that an earlier push wrote is, and the rest of a card
        stays as its owner has it.

    Raises
    ------
    UsageError
        If a name makes no sense, ``private`` does not fit the repository, or a named base is not there.
    MismatchError
        If the branch is not at ``parent``, or moves on while the patch is sent; if ``base`` is not the one
        the patch names; if the card that is there cannot be read.
    CorruptFileError
        If the patch's hashes do not match its content; nothing was sent.
    MachineError
        If the Hub refuses or cannot be reached. The branch is as it was.
    """
    loaded = patch if isinstance(patch, Patch) else Patch.load(patch)
    plan = plan_push(
        loaded,
        repo,
        private=private,
        revision=revision,
        message=message,
        base=base,
        parent=parent,
        replace_card=replace_card,
        progress=progress,
    )
    for warning in plan.warnings:
        log.warning("%s", warning)
    return send(plan)


def plan_push(
    patch: Patch,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    base: str | None = None,
    parent: str | None = None,
    replace_card: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Push:
    """Check everything that `push` needs, and write the card; nothing is sent.

    A ``dry_run`` does without the Hub where that refuses or cannot be reached: the card is then the one
    of a new repository, and a warning says so.
    """
    if not is_repo(repo):
        raise UsageError("not the name of a repository", file=repo, hint="name it as org/name")
    origin = base_of(patch, base)
    if repo == origin.repo:
        raise UsageError(
            "that is the repository of the base itself", file=repo, hint="name one of the patch's own"
        )
    if message is not None and not message.strip():
        raise UsageError("the commit's message is empty")
    check_patches([patch], progress)
    warnings = []
    try:
        remote = read_remote(repo, revision or MAIN)
    except MachineError as error:
        if not dry_run:
            raise
        remote = Remote(repo, revision or MAIN)
        warnings.append(f"what is there already was not looked at: {error.what}")
    else:
        _check_remote(remote, private, parent)
    licence, warning = licence_of(origin, required=base is not None and not dry_run)
    if warning is not None:
        warnings.append(warning)
    if origin.repo is None:
        warnings.append(
            "the patch does not know its base's Hub id, so the card names none: give it with --base"
        )
    picture = picture_of(patch)
    card = write_card(
        patch,
        repo,
        origin,
        licence,
        picture=PICTURE_NAME if picture else None,
        existing=None if replace_card else remote.card(),
    )
    verb = "Update" if PATCH_NAME in remote.files else "Add"
    said = message or f"{verb} neuron patch: {patch.neurons:,} neurons of {len(patch.tensors):,} tensors"
    return Push(patch, origin, remote, private, said, card, picture, tuple(warnings))


def _check_remote(remote: Remote, private: bool | None, parent: str | None) -> None:
    if private and remote.exists and not remote.private:
        raise UsageError(
            "the repository is there already, and it is public",
            file=remote.repo,
            hint="push without --private, name another one, or make it private on its page",
        )
    if parent is not None and parent != remote.head:
        raise MismatchError(
            "the repository is not at the commit that --parent names",
            file=f"{remote.repo}@{remote.branch}",
            expected=parent,
            found=remote.head or "no repository",
            hint="nothing was changed: look at what is new there, and name its commit",
        )


def send(plan: Push) -> Pushed:
    """Carry out a planned push."""
    if plan.patch.path is not None:
        plan.patch.check_in_place()  # what is sent is what was checked
    api, remote = client().HfApi(), plan.remote
    named = f"{remote.repo}@{remote.branch}"
    with hub_errors(named, doing="pushing to"):
        parent = remote.head
        if parent is None:
            api.create_repo(remote.repo, private=plan.private)
            parent = api.model_info(remote.repo).sha
        with _telling_what_was_made(remote):
            if not remote.has_branch and remote.branch != MAIN:
                api.create_branch(remote.repo, branch=remote.branch, revision=parent, exist_ok=False)
            with ExitStack() as stack:
                operations = list(_operations(plan, stack))
                # Large files are sent before the commit. Several at once would be sent by threads of the
                # client's, which Ctrl-C has to wait for: so the picture, which is small, goes first.
                for picture in operations[2:]:
                    api.preupload_lfs_files(remote.repo, [picture], revision=remote.branch, free_memory=False)
                try:
                    done = api.create_commit(
                        remote.repo,
                        operations=operations,
                        commit_message=plan.message,
                        revision=remote.branch,
                        parent_commit=parent,
                    )
                except ValueError as error:
                    _raise_refused_card(error, remote)
                    raise
    return Pushed(
        remote.repo,
        remote.branch,
        done.oid,
        page(remote.repo),
        not remote.exists,
        done.oid != parent,
        plan.card,
    )


def _operations(plan: Push, stack: ExitStack) -> Iterator[Any]:
    """What the commit adds. A patch that was never saved is sent from where it lies."""
    add = client().CommitOperationAdd
    patch = plan.patch
    yield add(PATCH_NAME, patch.path or stack.enter_context(patch.stream()))
    yield add("README.md", plan.card.encode())
    if plan.picture:
        yield add(PICTURE_NAME, plan.picture)


@contextmanager
def _telling_what_was_made(remote: Remote) -> Iterator[None]:
    """Say of a repository that was just made, and is left without a patch, that it is there."""
    try:
        with hub_errors(f"{remote.repo}@{remote.branch}", doing="pushing to"):
            yield
    except NeftError as error:
        if not remote.exists:
            error.hint = "; ".join(filter(None, [error.hint, "the repository was made, and is still empty"]))
        raise


def _raise_refused_card(error: ValueError, remote: Remote) -> None:
    """The client asks the Hub about the front matter before it sends anything, and raises what it says."""
    text = str(error)
    if isinstance(error, client().errors.HfHubHTTPError) or "README.md" not in text:
        return
    reasons = "; ".join(line.lstrip("- ") for line in text.splitlines()[1:] if line.strip())
    raise MismatchError(
        f"the Hub does not take the card's front matter: {redacted(reasons)[:200] or 'no reason given'}",
        file=remote.repo,
        hint="correct it on the Hub, or write a new card over it with --replace-card",
    ) from error
