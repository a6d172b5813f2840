"""pull: fetch a patch from the Hub into a local file, once all its hashes are checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptFileError, UsageError, boundary
from ..patch.lossless import LosslessPatch, load_any
from ..patch.patch import Patch
from ..patch.patch_file import PATCH_NAME
from ..progress import Progress, silent
from ..sources.hub_client import HubFile, fetch_file, find_file, is_offline
from ..sources.hub_id import HubId
from ..sources.resolve import Source
from ..storage.output_checks import AnyPath, refuse_output
from ..surgery.chains import opened_patches
from ..surgery.merge_checks import check_patches
from ..surgery.verb import check_sha256, require_sha256
from ..text import printable, size


@dataclass(frozen=True, slots=True)
class PullPlan:
    """A planned pull: the names are checked, and nothing is fetched."""

    hub_id: HubId  # with the revision if one was named
    out: str | os.PathLike[str] | None  # None: the patch stays in the cache
    force: bool
    file: HubFile | None  # None in offline mode, where only the cache is read
    sha256: str | None = None  # that the file must have

    def __str__(self) -> str:
        file = self.file
        found = "from the cache" if file is None else f"{size(file.nbytes or 0)}, commit {file.commit}"
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
    def run(self, *, progress: Progress = silent) -> Patch | LosslessPatch:
        """Fetch the patch, check it and write it; raises as `pull`."""
        (patch,) = opened_patches([self._fetched()], self.sha256)
        try:
            if isinstance(patch, Patch):
                check_patches([patch], progress)  # a lossless one needs its base for that
        except BaseException:
            patch.close()
            raise
        if self.out is None:
            return patch
        with patch:
            patch.save(self.out, force=self.force)
        return load_any(Path(self.out))

    def _fetched(self) -> Source:
        """The file in the cache, of the very commit that was planned for, even if the branch has moved."""
        commit = None if self.file is None else self.file.commit
        pinned = self.hub_id if commit is None else HubId(self.hub_id.repo, commit)
        for again in (False, True):  # a damaged copy in the cache is fetched once more
            path = fetch_file(pinned, PATCH_NAME, again=again)
            with path.open("rb") as content:
                if self.file is None or self.file.is_content(content):
                    return Source(path, str(self.hub_id), self.hub_id.repo, path.parent.name)
        raise CorruptFileError(
            f"the {PATCH_NAME} that was received is not the one that the Hub announced",
            file=str(self.hub_id),
            hint="nothing was written: run the command again",
        )


@boundary
def plan_pull(named: str, out: AnyPath | None, sha256: str | None, force: bool) -> PullPlan:
    """Check what `pull` needs without fetching the file; arguments and errors as there."""
    (wanted,) = check_sha256(sha256, 1)
    hub_id = HubId.parse(str(named))
    if hub_id is None:
        raise UsageError("not a Hub id", file=named, hint="name it as org/name or org/name@revision")
    refuse_output(out, inputs=[], force=force, kind="file")
    file = None if is_offline() else find_file(hub_id, PATCH_NAME)
    if wanted and file and file.etag and len(file.etag) == len(wanted):  # that of a large file is its SHA-256
        require_sha256(str(hub_id), wanted, file.etag)
    return PullPlan(hub_id, out, force, file, wanted)


def pull(
    named: str,
    out: str | os.PathLike[str] | None = None,
    *,
    sha256: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Patch | LosslessPatch:
    """Fetch a patch from the Hugging Face Hub, and check all hashes of its content.

    Only the patch is fetched, into huggingface_hub's cache. Returns the patch at ``out``, or in the cache.

    Args:
        named: ``org/name`` or ``org/name@revision``.
        out: The file to write, all or nothing. None: the patch stays in the cache.
        sha256: The SHA-256 that the file must have.
        force: Replace ``out`` if it exists.

    Raises:
        UsageError: If the repository or the revision does not exist, or ``out`` exists.
        MismatchError: If the repository has no patch.
        CorruptFileError, MachineError: If the patch is damaged, or has another SHA-256; if the Hub refuses
            (401, 403, gated) or cannot be reached, or ``out`` cannot be written. Nothing is written.
    """
    return plan_pull(named, out, sha256, force).run(progress=progress)
