"""The parts of a folder made of several models, by the lists of diffusers and sentence-transformers.

A part is a subfolder, or the folder itself. The lists of parts come with the model: names are not trusted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptFileError
from ..tensors.document import read_object, read_value

PIPELINE_NAME, MODULES_NAME = "model_index.json", "modules.json"
#: Classes of sentence-transformers that have weights: of others, a folder without any is whole.
_WITH_WEIGHTS = """Transformer MLMTransformer CLIPModel Dense LSTM CNN LayerNorm StaticEmbedding
SparseStaticEmbedding SparseAutoEncoder WeightedLayerPooling WordEmbeddings"""


@dataclass(frozen=True, slots=True)
class ListedPart:
    """A part as the list of parts names it."""

    prefix: str  # what comes before the names of its files and tensors, ``unet/``; empty: the folder itself
    kind: str  # its class
    list_name: str  # the file that names it

    def has_weights(self, folder: Path) -> bool:
        """Whether the part, in ``folder``, is a model. Of a pipeline, all have a config."""
        if self.list_name == PIPELINE_NAME:
            return not folder.is_dir() or (folder / "config.json").is_file()
        return self.kind.rpartition(".")[2] in _WITH_WEIGHTS.split()


def listed_parts(folder: Path) -> list[ListedPart]:
    """The parts that a folder says it is made of; none if it is not made of parts.

    Raises a `CorruptFileError` if the list is damaged, or names anything but subfolders.
    """
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
