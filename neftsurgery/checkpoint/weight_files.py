"""Which files hold the weights of a checkpoint folder: one file, or those that its index names."""

from __future__ import annotations

from pathlib import Path

from ..errors import CorruptFileError, UsageError, naming
from ..tensors.header import loads

__all__ = ["INDEX_NAME", "SINGLE_NAME", "weight_files"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 200_000_000
_MAX_NAME_BYTES = 255


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder; a single file beats an index beside it.

    Raises a `UsageError` if there are none, a `CorruptFileError` if the index is damaged, or points outside
    its folder.
    """
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed_files(folder, index)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    raise UsageError(
        f"the folder holds neither {SINGLE_NAME} nor {INDEX_NAME}",
        file=folder,
        hint=f"it does hold {', '.join(others[:3])}: name that file" if others else None,
    )


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise CorruptFileError(f"the index is larger than {_MAX_INDEX_BYTES} bytes", file=index)
    try:
        with naming(index):
            content = loads(index.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"the index is not valid JSON: {error}", file=index) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptFileError("the index has no weight_map of tensor names to file names", file=index)
    paths = []
    for name in sorted(set(weight_map.values())):
        # A shard is in the folder itself. Symlinks are allowed (the Hub cache is made of them):
        # they are the user's own, while the index comes with the model.
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise CorruptFileError(f"the index points outside its folder: {name[:200]!r}", file=index)
        path = folder / name
        if len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES or not path.is_file():
            raise CorruptFileError(
                f"the index names {name[:200]!r}, which is not there",
                file=index,
                hint="a shard is missing: fetch the checkpoint again",
            )
        paths.append(path)
    if not paths:
        raise CorruptFileError("the index names no file", file=index)
    return paths
