"""Which files hold the weights of a checkpoint folder: one file, or those that its index names."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection
from pathlib import Path

from ..errors import CorruptFileError, UsageError
from ..sources.hub_client import OTHER_ENDINGS
from ..sources.resolve import INDEX_NAME, SINGLE_NAME
from ..tensors.document import read_object
from ..tensors.file_kinds import foreign_folder
from ..tensors.header import MAX_HEADER_BYTES

__all__ = ["INDEX_NAME", "SINGLE_NAME", "shard_count", "weight_files"]

_MAX_NAME_BYTES = 255
_MAX_PATH = 1000
_SHARD = re.compile(r"-\d{1,9}-of-(\d{1,9})\.safetensors$")


def weight_files(folder: Path) -> tuple[list[str], Collection[str]]:
    """The weight files of a checkpoint folder, as paths below it, and the tensors that its index lists.

    A single file beats an index. A `UsageError` says that there are none, a `CorruptFileError` what is
    damaged.
    """
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file():
        return [SINGLE_NAME], ()
    if index.is_file():
        weight_map = _weight_map(index)
        return _indexed_files(folder, index, set(weight_map.values())), weight_map.keys()
    what, hint = foreign_folder(folder, OTHER_ENDINGS)
    raise UsageError(
        f"the folder holds neither {SINGLE_NAME} nor {INDEX_NAME}", file=folder, found=what, hint=hint
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index, most=MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptFileError("the index has no weight_map of tensor names to file names", file=index)
    if not weight_map:
        raise CorruptFileError("the index names no file", file=index)
    return weight_map


def _indexed_files(folder: Path, index: Path, spelled: Collection[str]) -> list[str]:
    found: set[str] = set()
    for name in sorted(spelled):
        # A shard is in the folder, or below it. Symlinks are allowed (the Hub cache is made of them):
        # they are the user's own, while the index comes with the model.
        plain = posixpath.normpath(name)
        if plain in (".", "..") or plain.startswith(("/", "../")) or "\\" in name or "\0" in name:
            raise CorruptFileError(f"the index points outside its folder: {name[:200]!r}", file=index)
        longest = max(len(part.encode("utf-8", "surrogatepass")) for part in plain.split("/"))
        if longest > _MAX_NAME_BYTES or len(plain) > _MAX_PATH or not (folder / plain).is_file():
            raise _missing(folder, index, name, {posixpath.normpath(one) for one in spelled})
        found.add(plain)
    return sorted(found)


def _missing(folder: Path, index: Path, name: str, named: Collection[str]) -> CorruptFileError:
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in named)
    if other := next((one for one in others if shard_count(one) not in (None, shard_count(name))), None):
        return CorruptFileError(
            "the index is stale: it is of another save than the files beside it",
            file=index,
            expected=repr(name[:200]),
            found=repr(other[:200]),
            hint="save the checkpoint again into an empty folder, or delete the index and name the file",
        )
    return CorruptFileError(
        f"the index names {name[:200]!r}, which is not there",
        file=index,
        hint="a shard is missing: fetch the checkpoint again",
    )


def shard_count(name: str) -> int | None:
    """How many shards the name of one says there are: 3 for ``model-00001-of-00003.safetensors``."""
    found = _SHARD.search(name)
    return int(found[1]) if found else None
