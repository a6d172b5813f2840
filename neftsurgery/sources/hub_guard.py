"""What is checked of every answer of a Hub before huggingface_hub acts on it: names, lengths and speed.

The client makes names of files from ETags and commits, writes a body until it ends, reads answers of the API
into memory whole, and waits for them without a limit. A server that lies must not reach a file outside the
cache, fill a disk or the memory, or hold a call for ever.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from ..errors import CorruptFileError, MachineError
from ..text import size

#: A body is read up to here if no HEAD request has told its length: answers of the API are such.
_MAX_UNANNOUNCED = 64 * 2**20
#: Less than this in the seconds that the client waits for the next byte counts as nothing.
_MIN_BYTES = 1000
#: Where the client would wait for ever, it waits this many times as long as for the next byte of a file.
_PATIENCE = 30

_PLAIN = re.compile(r'(W/)?"?\w[\w.+=~:-]{0,199}"?', re.ASCII)  # can name one file
_NAMES = ("X-Repo-Commit", "X-Linked-Etag", "ETag")
_LOCK = threading.Lock()


class Guard:
    """Makes the HTTP clients of huggingface_hub as ``make`` does; their answers are checked while `running`.

    In ``seconds``, some bytes must arrive.
    """

    def __init__(self, make: Callable[[], Any], seconds: float) -> None:
        self._make, self._seconds = make, seconds
        self._running = 0
        self._sizes: dict[str, int] = {}  # by address, as a HEAD request told

    def __call__(self) -> Any:
        """A new client."""
        made = self._make()
        made.event_hooks["request"].append(self._check_request)
        made.event_hooks["response"].append(self._check_answer)
        return made

    @contextmanager
    def running(self) -> Iterator[None]:
        """Check what any thread asks of the Hub meanwhile: the client downloads in threads of its own."""
        with _LOCK:
            self._running += 1
        try:
            yield
        finally:
            with _LOCK:
                self._running -= 1
                if not self._running:
                    self._sizes.clear()

    def _check_request(self, request: Any) -> None:
        if not self._running:
            return
        waits = request.extensions.get("timeout", {})
        for what in ("connect", "read", "write", "pool"):
            if waits.get(what) is None:
                waits = {**waits, what: self._seconds * _PATIENCE}
        request.extensions["timeout"] = waits
        request.headers["Accept-Encoding"] = "identity"  # so that lengths are those of the files
        # A commit that an answer names becomes a folder, but first a part of the next address.
        path = unquote(request.url.path)
        if re.search("/(api|resolve)/", path) and {"", ".", ".."} & set(path.strip("/").split("/")):
            raise CorruptFileError("the Hub names a commit or a file that is a path", found=path[-200:])

    def _check_answer(self, answer: Any) -> None:
        if not self._running:
            return
        url, headers, location = str(answer.request.url), answer.headers, answer.headers.get("Location")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise MachineError("the Hub sends a compressed body, which was not asked for")
        if answer.request.method == "HEAD":
            for name in _NAMES:
                if not _PLAIN.fullmatch(value := headers.get(name, "none")):
                    raise CorruptFileError(f"the Hub's {name} is not a plain name", found=repr(value[:80]))
            told = headers.get("X-Linked-Size", "" if location else headers.get("Content-Length", ""))
            if told.isdecimal():
                self._sizes[url] = int(told)
        limit = self._sizes.get(url, _MAX_UNANNOUNCED)
        if location and url in self._sizes:
            there = type(answer.url)(location)  # as the client reads it: join would change some addresses
            self._sizes[str(answer.url.join(location) if there.is_relative_url else there)] = limit
        resumed = re.match(r"bytes=(\d+)-", answer.request.headers.get("Range", ""))
        start = int(resumed[1]) if resumed and answer.status_code == 206 else 0
        raw = answer.iter_raw  # every way to read a body goes through this
        answer.iter_raw = lambda chunk_size=None: self._body(raw(chunk_size), start, limit)

    def _body(self, chunks: Iterator[bytes], position: int, limit: int) -> Iterator[bytes]:
        since, mark = time.monotonic(), position
        for chunk in chunks:
            position += len(chunk)
            if position > limit:
                raise CorruptFileError(f"the Hub sends a body of more than {size(limit)}")
            waited = time.monotonic() - since
            if waited > self._seconds and position - mark < _MIN_BYTES:
                what = f"the Hub sends too slowly: {size(position - mark)} in {waited:.0f} s"
                hint = "try again later; HF_HUB_DOWNLOAD_TIMEOUT says how many seconds 1 kB may take"
                raise MachineError(what, hint=hint)
            if waited > self._seconds:
                since, mark = time.monotonic(), position
            yield chunk


@contextmanager
def guarded() -> Iterator[None]:
    """Check the answers to huggingface_hub in this context."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    with _LOCK:
        guard = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
        if not isinstance(guard, Guard):
            guard = Guard(guard, constants.HF_HUB_DOWNLOAD_TIMEOUT)
            set_client_factory(guard)
    with guard.running():
        yield
