"""The files beside the weights in a checkpoint folder: which are copied, and which would be stale."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..sources.weight_forms import OTHER_ENDINGS, OTHER_FOLDERS
from .checkpoint import Checkpoint
from .unfinished import JOURNAL_NAME
from .weight_files import INDEX_NAME, SINGLE_NAME

__all__ = ["FolderFiles", "folder_files"]

_STALE_ENDINGS = (*OTHER_ENDINGS, ".safetensors")
_STALE_FOLDERS = (*OTHER_FOLDERS, ".git", ".cache")
_OURS = re.compile(r"\..+\.neft-(journal|(old-)?[0-9a-f]{16})")


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """Paths relative to the checkpoint's folder.

    Attributes
    ----------
    along:
        Files that are copied byte for byte.
    left:
        Files and folders that are not copied: mostly other forms of the weights, which would be stale.
    """

    along: tuple[Path, ...]
    left: tuple[Path, ...]


def folder_files(checkpoint: Checkpoint) -> FolderFiles:
    """Sort the files beside the weights of a checkpoint folder.

    Weights in the top folder that are not the checkpoint's own are left behind, whatever their format.
    Subfolders (modules, as in sentence-transformers) are copied whole.
    """
    root = checkpoint.root
    own = {shard.path.name for shard in checkpoint.shards}
    stale_index = None if len(own) > 1 or _indexed(checkpoint) else INDEX_NAME
    along: list[Path] = []
    left: list[Path] = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        name = entry.name
        if name in own or name == JOURNAL_NAME or _is_ours(name):
            continue
        if entry.is_dir():
            if name in _STALE_FOLDERS or entry.is_symlink():  # a link may lead anywhere, also back here
                left.append(Path(name))
            else:
                along += _tree(root, Path(name))
        elif name == stale_index or name.endswith(_STALE_ENDINGS):
            left.append(Path(name))
        elif entry.is_file():
            along.append(Path(name))
        else:  # a pipe, a link that leads nowhere
            left.append(Path(name))
    return FolderFiles(tuple(along), tuple(left))


def _indexed(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint was found through its index (one shard may have an index, too)."""
    return [shard.path.name for shard in checkpoint.shards] != [SINGLE_NAME]


def _is_ours(name: str) -> bool:
    """Journals of single files, and what killed processes of this package left."""
    return _OURS.fullmatch(name) is not None


def _tree(root: Path, folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:  # by default os.walk skips what it cannot list
        raise error

    found: list[Path] = []
    for path, folders, names in os.walk(root / folder, onerror=fail, followlinks=False):
        folders.sort()
        found += [Path(path, name).relative_to(root) for name in sorted(names) if Path(path, name).is_file()]
    return found
