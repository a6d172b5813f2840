"""pull: a patch of the Hub becomes a local file, once all its hashes are checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptFileError, UsageError, boundary
from ..patch.patch import PATCH_NAME, Patch
from ..progress import Progress, silent
from ..sources.hub_client import RemoteFile, fetch_file, is_damaged, is_offline, remote_file
from ..sources.resolve import Source
from ..storage.output_checks import refuse_output
from ..surgery.merge_plan import check_patches
from .base_model import is_repo

__all__ = ["Pull", "fetch", "plan_pull", "pull"]


@dataclass(frozen=True, slots=True)
class Pull:
    """A planned pull: nothing is fetched.

    Attributes
    ----------
    named:
        As the user named it.
    remote:
        What the Hub says of the file; None where the Hub is switched off and the cache is to have it.
    """

    named: str
    remote: RemoteFile | None


@boundary
def pull(
    named: str,
    out: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Patch:
    """Fetch a patch from the Hugging Face Hub, and check all hashes of its content.

    Nothing but the patch is fetched, into huggingface_hub's cache; what is there is not fetched again.

    Parameters
    ----------
    named:
        ``org/name`` or ``org/name@revision``.
    out:
        Where to write it, whole or not at all. None: it stays in the cache.
    force:
        Replace ``out`` if it exists.

    Returns
    -------
    Patch
        The file at ``out``, or that in the cache; opened.

    Raises
    ------
    UsageError
        If there is no such repository or revision, or ``out`` exists.
    MismatchError
        If the repository holds no patch.
    CorruptFileError
        If the patch is damaged; nothing is written.
    MachineError
        If the Hub refuses (401, 403, gated) or cannot be reached, or ``out`` cannot be written.
    """
    return fetch(plan_pull(named, out, force=force), out, force=force, progress=progress)


def plan_pull(named: str, out: str | os.PathLike[str] | None = None, *, force: bool = False) -> Pull:
    """Check everything that `pull` needs without fetching the file."""
    repo, at, revision = str(named).partition("@")
    if not is_repo(repo) or bool(at) != bool(revision):
        raise UsageError("not a Hub id", file=named, hint="name it as org/name or org/name@revision")
    if out is not None:
        refuse_output(out, inputs=[], force=force, kind="file")
    return Pull(str(named), None if is_offline() else remote_file(str(named), PATCH_NAME))


def fetch(
    plan: Pull,
    out: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Patch:
    """Carry out a planned pull."""
    source = _source(plan)
    try:
        patch = _checked(source, progress)
    except CorruptFileError:
        if plan.remote is None or not is_damaged(source.path):
            raise
        # The Hub's file is another one: what was damaged is the cache's copy of it.
        fetch_file(_pinned(plan), PATCH_NAME, again=True)
        patch = _checked(source, progress)
    if out is None:
        return patch
    with patch:
        patch.save(out, force=force)
    return Patch.load(Path(out))


def _pinned(plan: Pull) -> str:
    """The file at the very commit that was planned for, whatever becomes of the branch."""
    repo = plan.named.partition("@")[0]
    commit = plan.remote.commit if plan.remote is not None else None
    return plan.named if commit is None else f"{repo}@{commit}"


def _source(plan: Pull) -> Source:
    repo = plan.named.partition("@")[0]
    file = fetch_file(_pinned(plan), PATCH_NAME)
    return Source(file, plan.named, repo, file.parent.name)


def _checked(source: Source, progress: Progress) -> Patch:
    patch = Patch.load(source)
    try:
        check_patches([patch], progress)
    except BaseException:
        patch.close()
        raise
    return patch
