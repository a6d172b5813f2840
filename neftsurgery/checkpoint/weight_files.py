"""Which files hold the weights of a checkpoint folder: one, those that an index names, those of its parts."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptFileError, UsageError
from ..sources.hub_client import OTHER_ENDINGS
from ..sources.resolve import INDEX_NAME, SINGLE_NAME, is_index
from ..tensors.document import read_object, read_value
from ..tensors.file_kinds import foreign_folder
from ..tensors.header import MAX_HEADER_BYTES

PIPELINE_NAME, MODULES_NAME = "model_index.json", "modules.json"
#: Classes of sentence-transformers that have weights: of others, a folder without any is whole.
_WITH_WEIGHTS = """Transformer MLMTransformer CLIPModel Dense LSTM CNN LayerNorm StaticEmbedding
SparseStaticEmbedding SparseAutoEncoder WeightedLayerPooling WordEmbeddings"""
_MAX_NAME_BYTES = 255
_MAX_PATH = 1000
_SHARD = re.compile(r"-\d{1,9}-of-(\d{1,9})(?:\.[\w-]+)?\.safetensors$")
#: The files that readers look for, in this order: of transformers, timm and others, and of diffusers.
_USUAL = (
    SINGLE_NAME, INDEX_NAME,
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of a checkpoint folder, as paths below it."""

    parts_of: Mapping[str, str]  # by weight file, the part whose name comes before those of its tensors
    indexes: Collection[str] = ()  # the indexes that led to them
    listed: Collection[str] = ()  # the tensors that indexes list
    parts: tuple[str, ...] = ()  # ``unet/``: those that the folder lists, with weights or without


def weight_files(folder: Path, index: str | None = None) -> WeightFiles:
    """The weight files of a folder, or of one ``index`` of it; a single file beats an index."""
    listed = [] if index else listed_parts(folder)
    if not listed:
        return _in_folder(folder, index)
    found = {part: _of_part(folder / part.prefix, part) for part in listed}
    if not any(one.parts_of for one in found.values()):
        raise UsageError(
            f"none of the parts that {listed[0].list_name} names holds weights",
            file=folder,
            hint="fetch the checkpoint again",
        )
    return WeightFiles(
        {part.prefix + name: part.prefix for part, one in found.items() for name in one.parts_of},
        [part.prefix + name for part, one in found.items() for name in one.indexes],
        [part.prefix + name for part, one in found.items() for name in one.listed],
        tuple(part.prefix for part in listed),
    )


def _of_part(folder: Path, part: ListedPart) -> WeightFiles:
    """The weight files of a part, none if it is not a model."""
    names = os.listdir(folder) if folder.is_dir() else []
    if any(name.endswith(".safetensors") or is_index(name) for name in names):
        return _in_folder(folder)
    if part.list_name == PIPELINE_NAME:  # of which all models have a config
        is_model = not folder.is_dir() or (folder / "config.json").is_file()
    else:
        is_model = part.kind.rpartition(".")[2] in _WITH_WEIGHTS.split()
    if not is_model:
        return WeightFiles({})
    if any(name.endswith(OTHER_ENDINGS) for name in names):
        return _in_folder(folder)  # which says how they are converted
    raise CorruptFileError(
        f"{part.list_name} names this part, a {part.kind[:80]}, and its weights are not there",
        file=folder,
        hint="a part is missing: fetch the checkpoint again",
    )


def _in_folder(folder: Path, index: str | None = None) -> WeightFiles:
    name = index or _chosen(folder)
    if not is_index(name):
        return WeightFiles({name: ""})
    weight_map = _weight_map(folder / name)
    files = _indexed_files(folder, folder / name, {file: one for one, file in weight_map.items()})
    return WeightFiles(dict.fromkeys(files, ""), (name,), weight_map.keys())


def _chosen(folder: Path) -> str:
    """The file that a reader of ``folder`` begins with: a weight file, or an index."""
    for name in _USUAL:
        if (folder / name).is_file():
            return name
    what, hint = foreign_folder(folder, OTHER_ENDINGS)
    why = f"the folder holds neither {SINGLE_NAME} nor {INDEX_NAME}"
    if what is None:
        names = sorted(name for name in os.listdir(folder) if (folder / name).is_file())
        indexes = [name for name in names if is_index(name)]  # of a variant, such as fp16
        weights = [name for name in names if name.endswith(".safetensors")]
        if len(indexes or weights) == 1 and (indexes or shard_count(weights[0]) is None):
            return (indexes or weights)[0]
        if len(indexes) > 1:
            why, hint = "the folder holds several indexes", f"name one of them: {', '.join(indexes[:3])}"
        elif weights and shard_count(weights[0]) is not None:
            why, hint = "the folder holds shards without their index", f"{hint}, or fetch {INDEX_NAME}"
        elif weights:
            why = "the folder holds several weight files without an index"
    raise UsageError(why, file=folder, found=what, hint=hint)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index, most=MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptFileError("the index has no weight_map of tensor names to file names", file=index)
    if not weight_map:
        raise CorruptFileError("the index names no file", file=index)
    return weight_map


def _indexed_files(folder: Path, index: Path, spelled: Mapping[str, str]) -> list[str]:
    found: set[str] = set()
    for name in sorted(spelled):
        # A shard is in the folder, or below it. Symlinks are allowed (the Hub cache is made of them):
        # they are the user's own, while the index comes with the model.
        plain = posixpath.normpath(name)
        if plain in (".", "..") or plain.startswith(("/", "../")) or "\\" in name or "\0" in name:
            raise CorruptFileError(f"the index points outside its folder: {name[:200]!r}", file=index)
        longest = max(len(part.encode("utf-8", "surrogatepass")) for part in plain.split("/"))
        if longest > _MAX_NAME_BYTES or len(plain) > _MAX_PATH or not (folder / plain).is_file():
            raise _missing(folder, index, name, spelled)
        found.add(plain)
    return sorted(found)


def _missing(folder: Path, index: Path, name: str, spelled: Mapping[str, str]) -> CorruptFileError:
    others = sorted({p.name for p in folder.glob("*.safetensors")} - {*map(posixpath.normpath, spelled)})
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
        tensor=spelled[name],  # one of those in it
        hint="a shard is missing: fetch the checkpoint again",
    )


def shard_count(name: str) -> int | None:
    """How many shards the name of one says there are: 3 for ``model-00001-of-00003.safetensors``."""
    found = _SHARD.search(name)
    return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class ListedPart:
    """A part as the list of parts names it."""

    prefix: str  # what comes before the names of its files and tensors, ``unet/``; empty: the folder itself
    kind: str  # its class
    list_name: str  # the file that names it


def listed_parts(folder: Path) -> list[ListedPart]:
    """The parts that a folder lists; a `CorruptFileError` if it names anything but subfolders."""
    for list_name, read in ((PIPELINE_NAME, _of_pipeline), (MODULES_NAME, _of_modules)):
        path = folder / list_name
        found = read(path) if path.is_file() else {}
        for name in found:
            if name and (not is_plain(name) or name.startswith(".")):
                raise CorruptFileError(f"it names a part outside of its folder: {name[:200]!r}", file=path)
        if found:
            return [ListedPart(name and f"{name}/", kind, list_name) for name, kind in found.items()]
    return []


def _of_pipeline(path: Path) -> dict[str, str]:
    """The parts of ``model_index.json``: ``"unet": ["diffusers", "UNet2DConditionModel"]``."""
    found: dict[str, str] = {}
    for name, entry in read_object(path).items():
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(one, str) for one in entry):
            found[name] = entry[1]
    for name in [*found]:  # several models of one kind are saved as NAME, NAME_1, NAME_2
        number = 1
        while is_plain(name) and (path.parent / f"{name}_{number}").is_dir():
            found.setdefault(f"{name}_{number}", found[name])
            number += 1
    return found


def _of_modules(path: Path) -> dict[str, str]:
    """The parts of ``modules.json``: ``{"path": "2_Dense", "type": "....models.Dense"}``."""
    entries = read_value(path)
    if not isinstance(entries, list) or not all(
        isinstance(entry, Mapping) and isinstance(entry.get("path"), str) for entry in entries
    ):
        raise CorruptFileError("it is not a list of modules with their paths", file=path)
    found = {entry["path"].rstrip("/"): str(entry.get("type", "")) for entry in entries}
    router = path.with_name("router_config.json")  # of a module in the folder itself, with modules of its own
    types = read_object(router).get("types") if "" in found and router.is_file() else None
    return found | ({name: str(kind) for name, kind in types.items()} if isinstance(types, dict) else {})


def is_plain(name: str) -> bool:
    """Whether a name names a file in the folder itself."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return 0 < len(encoded) <= 255 and name not in (".", "..") and not set(name) & set("/\\\0")


def is_plain_path(name: str) -> bool:
    """Whether a name names a file in the folder itself or in a part."""
    part, slash, last = name.partition("/")
    return is_plain(part) and (not slash or (is_plain(last) and not part.startswith(".")))
