"""What a file or folder is, where another kind was wanted, and what helps: told by content, not by name.

It is asked only about what was refused. So nothing here decides what is read.
The table of what is known is ``file_kinds.toml``.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import hub_place

_HEAD, _TAIL = 4096, 65536
#: Bytes 4 to 8 of a safetensors file, however damaged the rest of it is.
_SAFETENSORS = b"\0\0\0\0{"


def foreign_file(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """What the file at ``path``, which is not a valid safetensors file, is instead, and what helps.

    None if it is not known. Reads its first and last bytes only.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
        if head.startswith(b"PK") and len(head) == _HEAD:  # a zip lists its names at its end
            file.seek(max(_HEAD, os.fstat(file.fileno()).st_size - _TAIL))
            head += file.read(_TAIL)
    if not head:
        return "an empty file", _filled("{AGAIN}", path)
    if head[4:9] == _SAFETENSORS:
        return None
    for pattern, what, hint in _known()["formats"]:
        if re.match(pattern.encode(), head, re.DOTALL):
            return what, _filled(hint, path)
    if re.fullmatch(rb"[\t\n\r -~]+", head):
        return f"a text file that begins with {head[:60].decode()!r}", _filled("{AGAIN}", path)
    return None


def foreign_folder(folder: Path, endings: tuple[str, ...] = ()) -> tuple[str | None, str]:
    """What a folder that is no checkpoint is instead, if that is known, and what helps.

    ``endings``: those of weights in other formats. The first such file is looked into.
    """
    names = sorted(os.listdir(folder))
    for pattern, what, hint in _known()["folders"]:
        if found := fnmatch.filter(names, pattern):
            return what, _filled(hint, folder, found[0])
    if found := fnmatch.filter(names, "*.safetensors"):
        return None, f"it does hold {', '.join(found[:3])}: name that file"
    weights = [name for name in names if name.endswith(endings) and (folder / name).is_file()]
    for name in sorted(weights, key=lambda name: ("model" not in name, not name.endswith(".bin"))):
        if other := foreign_file(folder / name):
            shards = fnmatch.filter(weights, f"{name.partition('-')[0]}-*{folder.joinpath(name).suffix}")
            rest = "".join(f" {shlex.quote(str(folder / shard))}" for shard in shards if shard != name)
            place = shlex.quote(str(folder / name))
            return f"{name}, {other[0]}", other[1].replace(place, place + rest)
    if not names:
        return "an empty folder", "name the folder that holds the weights"
    return None, "there are no safetensors weights here: `hf download ORG/NAME` fetches those of a Hub model"


@functools.cache
def _known() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("file_kinds.toml").read_text(encoding="utf-8"))


def _filled(hint: str, path: str | os.PathLike[str], first: str = "") -> str:
    """A hint with the words of a command quoted for a shell."""
    hint = re.sub("{([A-Z]+)}", lambda found: _known()["hints"][found[1]], hint)
    place = hub_place(os.fspath(path))
    folder, name = os.path.split(place)
    values = {"path": place, "folder": folder or ".", "name": name, "first": first}
    return re.sub(r"\{(path|folder|name|first)\}", lambda found: shlex.quote(values[found[1]]), hint)


#: The kinds of safetensors file that hold a document, by its key.
KINDS = {
    "neuron_patch": "a neuron patch",
    "neuron_selection": "a selection",
    "neuron_scores": "a scores file",
}
_CHECKPOINT, _ADAPTER = "a checkpoint", "a PEFT adapter"


def tensor_kind(metadata: Mapping[str, str], names: Iterable[str] = ()) -> str:
    """What a safetensors file is, by its metadata and the names of its tensors."""
    for key, what in KINDS.items():
        if key in metadata:
            return what
    return _ADAPTER if any(".lora_" in name for name in names) else _CHECKPOINT


def what_helps(key: str, found: str, path: str | os.PathLike[str] | None) -> str | None:
    """What helps somebody who gave a file of the kind ``found`` where that of ``key`` is wanted.

    The key ``""`` stands for a checkpoint. None for files that no user makes, such as journals.
    """
    hints = _known()["instead"].get(key, {})
    hint = hints.get(found, hints.get(""))
    return None if hint is None else _filled(hint, path or "FILE")


def folder_instead(folder: str | os.PathLike[str], key: str) -> str | None:
    """What helps somebody who gave a folder where a file of the kind of ``key`` is wanted."""
    names = os.listdir(folder)
    for name in (f"{key}.safetensors", f"{key.removeprefix('neuron_')}.safetensors"):
        if name in names:
            return f"name the file in it: {shlex.quote(os.path.join(folder, name))}"
    return what_helps(key, _ADAPTER if "adapter_config.json" in names else _CHECKPOINT, folder)
