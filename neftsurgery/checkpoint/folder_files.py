"""The files beside the weights in a checkpoint folder: which are copied, and which would be stale."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..sources.hub_client import OTHER_ENDINGS, OTHER_FOLDERS
from .checkpoint import Checkpoint
from .unfinished import JOURNAL_NAME
from .weight_files import INDEX_NAME, SINGLE_NAME

__all__ = ["FolderFiles", "folder_files"]

_STALE_ENDINGS = (*OTHER_ENDINGS, ".safetensors")
_STALE_FOLDERS = (*OTHER_FOLDERS, ".git", ".cache")
#: Journals of single files, and what killed processes of this package left.
_OURS = re.compile(r"\..+\.neft-(journal|(old-)?[0-9a-f]{16})")


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """Paths relative to the checkpoint's folder."""

    along: tuple[Path, ...]  # files that are copied byte for byte
    left: tuple[Path, ...]  # not copied: mostly other forms of the weights, which would be stale


def folder_files(checkpoint: Checkpoint) -> FolderFiles:
    """Sort the files beside the weights of a checkpoint folder.

    Weights in the top folder that are not the checkpoint's own are left behind, whatever their format.
    Subfolders (modules, as in sentence-transformers) are copied whole.
    """
    root = checkpoint.root
    own = {shard.path.name for shard in checkpoint.shards}
    # Any other names were found through the index; one shard may have an index, too.
    stale_index = INDEX_NAME if own == {SINGLE_NAME} else None
    along: list[Path] = []
    left: list[Path] = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        name = entry.name
        if name in own or name == JOURNAL_NAME or _OURS.fullmatch(name):
            continue
        if entry.is_dir():
            if name in _STALE_FOLDERS or entry.is_symlink():  # a link may lead anywhere, also back here
                left.append(Path(name))
            else:
                along += _tree(root, Path(name))
        elif name != stale_index and not name.endswith(_STALE_ENDINGS) and entry.is_file():
            along.append(Path(name))
        else:  # stale, a pipe, or a link that leads nowhere
            left.append(Path(name))
    return FolderFiles(tuple(along), tuple(left))


def _tree(root: Path, folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:  # by default os.walk skips what it cannot list
        raise error

    found: list[Path] = []
    for path, folders, names in os.walk(root / folder, onerror=fail, followlinks=False):
        folders.sort()
        found += [Path(path, name).relative_to(root) for name in sorted(names) if Path(path, name).is_file()]
    return found
