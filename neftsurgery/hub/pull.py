"""pull: fetch a patch from the Hub into a local file, once all its hashes are checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptFileError, UsageError, boundary
from ..patch.patch import PATCH_NAME, Patch
from ..progress import Progress, silent
from ..sources.hub_client import HubFile, fetch_file, find_file, is_damaged, is_offline
from ..sources.hub_id import HubId, is_repo
from ..sources.resolve import Source
from ..storage.output_checks import refuse_output
from ..surgery.merge_checks import check_patches
from ..text import printable, size

__all__ = ["PullPlan", "plan_pull", "pull"]


@dataclass(frozen=True, slots=True)
class PullPlan:
    """A planned pull: the names are checked, and nothing is fetched."""

    hub_id: HubId  # with the revision if one was named
    out: str | os.PathLike[str] | None  # None: the patch stays in the cache
    force: bool
    file: HubFile | None  # None in offline mode, where only the cache is read

    def __str__(self) -> str:
        found = "from the cache"
        if self.file is not None:
            found = f"{size(self.file.nbytes or 0)}, commit {self.file.commit}"
        then = "keep it in the cache" if self.out is None else f"write {os.fspath(self.out)}"
        return printable(f"fetch {self.hub_id} ({found}) and {then}")

    def describe(self) -> dict[str, object]:
        """For JSON. What only `run` can tell is None."""
        return {
            "named": str(self.hub_id),
            "commit": None if self.file is None else self.file.commit,
            "out": None,
            "bytes": None if self.file is None else self.file.nbytes,
            "neurons": None,
            "selected": None,
        }

    @boundary
    def run(self, *, progress: Progress = silent) -> Patch:
        """Fetch the patch, check it and write it; raises as `pull`."""
        source = self._fetched()
        try:
            patch = _checked(source, progress)
        except CorruptFileError:
            if self.file is None or not is_damaged(source.path):
                raise
            # The copy in the cache differs from the Hub's file: fetch that again.
            patch = _checked(self._fetched(again=True), progress)
        if self.out is None:
            return patch
        with patch:
            patch.save(self.out, force=self.force)
        return Patch.load(Path(self.out))

    def _fetched(self, *, again: bool = False) -> Source:
        """The file in the cache, of the very commit that was planned for, even if the branch has moved."""
        commit = None if self.file is None else self.file.commit
        pinned = self.hub_id if commit is None else HubId(self.hub_id.repo, commit)
        path = fetch_file(pinned, PATCH_NAME, again=again)
        return Source(path, str(self.hub_id), self.hub_id.repo, path.parent.name)


@boundary
def plan_pull(named: str, out: str | os.PathLike[str] | None = None, *, force: bool = False) -> PullPlan:
    """Check what `pull` needs without fetching the file; arguments and errors as there."""
    hub_id = HubId.split(str(named))
    if not is_repo(hub_id.repo) or ("@" in str(named) and hub_id.revision is None):
        raise UsageError("not a Hub id", file=named, hint="name it as org/name or org/name@revision")
    if out is not None:
        refuse_output(out, inputs=[], force=force, kind="file")
    return PullPlan(hub_id, out, force, None if is_offline() else find_file(hub_id, PATCH_NAME))


def pull(
    named: str,
    out: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Patch:
    """Fetch a patch from the Hugging Face Hub, and check all hashes of its content.

    Only the patch is fetched, into huggingface_hub's cache, unless it is there already. Returns the patch at
    ``out``, or in the cache; opened.

    Parameters
    ----------
    named:
        ``org/name`` or ``org/name@revision``.
    out:
        The file to write, all or nothing. None: the patch stays in the cache.
    force:
        Replace ``out`` if it exists.

    Raises
    ------
    UsageError
        If the repository or the revision does not exist, or ``out`` exists.
    MismatchError
        If the repository has no patch.
    CorruptFileError
        If the patch is damaged; nothing is written.
    MachineError
        If the Hub refuses (401, 403, gated) or cannot be reached, or ``out`` cannot be written.
    """
    return plan_pull(named, out, force=force).run(progress=progress)


def _checked(source: Source, progress: Progress) -> Patch:
    patch = Patch.load(source)
    try:
        check_patches([patch], progress)
    except BaseException:
        patch.close()
        raise
    return patch
