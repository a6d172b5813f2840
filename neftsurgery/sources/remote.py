"""Checkpoints behind URLs, read by ranges through files that stand in for theirs.

A stand-in is a local file of the name and size of a remote one. It holds the header of a weight file, and
nothing of its tensors: those are a hole. So all that looks at names, sizes, headers and configs works on it
as on the file itself. Whoever opens it with `neftsurgery.storage.positioned.OpenFile` reads the bytes behind
the URL. What describes the model is fetched whole; other files are empty until they are asked for.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptFileError, UsageError
from .places import find_place
from .web_file import IN_FLIGHT, AbsentError, RefusedError

_RANGE_BYTES = 4 << 20  # a longer range is fetched in several of about so many
_FIRST_BYTES = 64 << 10  # of a weight file: most headers are shorter
_MOST_HEADER, _MOST_WHOLE = 100_000_000, 64 << 20
_MOST_KEPT = 4096  # edges of tensors

#: What says how a folder is read, and where the parts are of a model made of some.
_DESCRIBING = re.compile(
    r"([^/]+/)?((adapter_|router_)?config|model_index|modules|[^/]+\.safetensors\.index(\.[\w-]+)?)\.json"
)
#: What is looked for where a server lists no files.
_USUAL = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json",
    "adapter_model.safetensors", "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)  # fmt: skip

Wanted = tuple[int, memoryview]  # bytes that are wanted: where they start, and where they go


@dataclass
class Fetched:
    """How many bytes were fetched from a URL, of how many of the files that are read there."""

    url: str
    nbytes: int = 0
    of: int = 0

    def count(self, nbytes: int, of: int = 0) -> None:
        """Add bytes that were fetched, and those of a file."""
        with _lock:
            self.nbytes += nbytes
            self.of += of


#: What was fetched from each URL that was opened in this process.
FETCHED: list[Fetched] = []
_lock = threading.Lock()
_threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="neft-remote")
_stand_ins = dict[tuple[int, int], "RemoteFile"]()  # by device and inode


def remote_file(opened: int | str | os.PathLike[str]) -> RemoteFile | None:
    """The weight file behind a URL, by what stands in for it. Any other file is fetched, and local then."""
    status = os.stat(opened) if _stand_ins else None
    found = None if status is None else _stand_ins.get((status.st_dev, status.st_ino))
    if found is not None:
        found.make()
    return found if found is not None and found.is_weights else None


class RemoteFile:
    """A file behind a URL. Thread-safe."""

    def __init__(self, folder: RemoteFolder, name: str) -> None:
        self.path, self._fetched, self.ranged = folder.root / name, folder.fetched, folder.place.file(name)
        self.is_weights, self.ranged.count = name.endswith(".safetensors"), folder.fetched.count
        self._lock, self._is_made = threading.Lock(), False
        self._kept: dict[tuple[int, int], bytes] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        status = self.path.stat()
        self._inode = status.st_dev, status.st_ino
        _stand_ins[self._inode] = self

    def make(self) -> None:
        """Put into the stand-in the header of a weight file, or the content of another one."""
        with self._lock:
            if self._is_made:
                return
            weights, most = self.is_weights, _FIRST_BYTES if self.is_weights else _MOST_WHOLE
            raw = b"".join(self.ranged.read(0, most, whole=not weights))
            if not weights and len(raw) < self.ranged.nbytes:
                raise CorruptFileError(f"the file has more than {_MOST_WHOLE} bytes", file=self.path)
            length = int.from_bytes(raw[:8], "little") + 8 if weights else 0
            if len(raw) < length <= min(self.ranged.nbytes, _MOST_HEADER):
                raw += b"".join(self.ranged.read(len(raw), length))
            with open(self.path, "r+b") as file:
                file.write(raw)
                file.truncate(self.ranged.nbytes)
            self._fetched.count(0, self.ranged.nbytes)
            self._is_made = True

    def leave(self) -> None:
        """Remove the stand-in, whose inode may be that of any file from then on."""
        _stand_ins.pop(self._inode, None)
        self.path.unlink(missing_ok=True)

    def fill(self, parts: Iterable[Wanted]) -> None:
        """Fill buffers, many at once. Raises as `RangedFile.read`."""
        wanted = list[Wanted]()
        for start, buffer in parts:
            if (kept := self._kept.get((start, len(buffer)))) is not None:
                buffer[:] = kept
                continue
            step = -(-len(buffer) // max(1, round(len(buffer) / _RANGE_BYTES))) or 1
            wanted += [(start + at, buffer[at : at + step]) for at in range(0, len(buffer), step)]
        list(_threads.map(self._fetch, wanted))

    def keep(self, places: Collection[tuple[int, int]]) -> None:
        """Fetch small ranges, ``(start, length)``, that will be asked for one by one."""
        if len(self._kept) + len(places) > _MOST_KEPT:
            self._kept = {}
        new, runs = sorted({*places} - self._kept.keys()), list[tuple[int, bytearray]]()
        for start, length in new:  # the end of a tensor and the start of the next one are one range
            if not runs or start != runs[-1][0] + len(runs[-1][1]):
                runs.append((start, bytearray()))
            runs[-1][1].extend(bytes(length))
        self.fill((start, memoryview(buffer)) for start, buffer in runs)
        fetched = io.BytesIO(b"".join(buffer for _, buffer in runs))
        self._kept |= {place: fetched.read(place[1]) for place in new}

    def _fetch(self, part: Wanted) -> None:
        """Fetch one range, and put it where it belongs."""
        (start, buffer), done = part, 0
        for chunk in self.ranged.read(start, start + len(buffer)):
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)
        if done < len(buffer):
            raise CorruptFileError("the file ends before its tensors do", file=self.path)


def _remove(home: str, files: dict[str, RemoteFile]) -> None:
    for file in files.values():
        file.leave()
    shutil.rmtree(home, ignore_errors=True)


class RemoteFolder:
    """The files behind a URL, and the local folder of what stands in for them, which ends with it.

    Raises as `find_place` and `RangedFile.read`.
    """

    _refused: RefusedError | None = None

    def __init__(self, url: str) -> None:
        self.url, self.place = url, (place := find_place(url))
        self.fetched, self.files = Fetched(place.shown), dict[str, RemoteFile]()
        FETCHED.append(self.fetched)
        home = tempfile.mkdtemp(prefix="neft-remote-")
        self.root = Path(home, place.shown.replace("/..", "/__"))
        self.root.mkdir(parents=True)
        weakref.finalize(self, _remove, home, self.files)
        wanted = [*filter(_DESCRIBING.fullmatch, place.names or ()), *filter(None, [place.single])]
        self._add({*(place.names or ()), *wanted})
        self.make(wanted)
        self.look_for(("config.json",) if place.single else _USUAL)
        if not any(".safetensors" in name for name in self.files):
            what = "there is no checkpoint at this address: neither a weight file nor an index"
            raise self._refused or UsageError(what, file=place.shown, hint="name the weight file itself")

    def make(self, names: Iterable[str]) -> None:
        """Fetch what stands in for these files, many at once: the headers of weight files."""
        list(_threads.map(RemoteFile.make, [self.files[name] for name in names if name in self.files]))

    def look_for(self, names: Iterable[str]) -> None:
        """Fetch what is there of these files, and what an index names, from a server that lists none."""
        if self.place.names is not None:
            return
        list(_threads.map(self._look, self._add(names)))
        for name in [name for name in self.files if name.endswith(".safetensors.index.json")]:
            # Who reads it says what is wrong with it.
            with suppress(ValueError, RecursionError, AttributeError, LookupError, TypeError):
                self._add({*json.loads((self.root / name).read_bytes())["weight_map"].values()})

    def _look(self, name: str) -> None:
        try:
            self.files[name].make()
        except (AbsentError, RefusedError) as error:  # buckets that do not list refuse what is not there
            self._refused = error if isinstance(error, RefusedError) else self._refused
            self.files.pop(name).leave()

    def _add(self, names: Iterable[str]) -> list[str]:
        """Have empty files stand in for those that have names of local files; returns the new ones."""
        added = []
        for name in names:
            if {"", ".", ".."} & {*name.split("/")} or {"\\", "\0"} & {*name} or name in self.files:
                continue
            with suppress(FileExistsError, NotADirectoryError, IsADirectoryError, UnicodeError):
                self.files[name] = RemoteFile(self, name)
                added.append(name)
        return added
