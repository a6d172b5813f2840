"""Files read by ranges, and those behind ``https://`` addresses; servers that ignore ranges are refused."""

from __future__ import annotations

import atexit
import functools
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from ..errors import CorruptFileError, MachineError, UsageError

#: Ranges that are asked for at the same time, by all threads together.
IN_FLIGHT = 24
#: So many bytes, or a whole shorter range, must arrive in this many times the seconds for the next byte.
_LEAST_BYTES, _TIMES = 64 << 10, 6
_FETCH = "fetch the checkpoint, and name the local folder"
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class AbsentError(UsageError):
    """There is no file at an address."""


class RefusedError(MachineError):
    """A server does not let this user read a file, or does not say that there is none."""


class FailedError(Exception):
    """Something failed that another try may mend."""


def replaced(file: str) -> MachineError:
    """The error for a file that is not the one whose header was read."""
    hint = "run the command again when nothing writes there"
    return MachineError("the file was replaced while it was read", file=file, hint=hint)


@functools.cache
def http_client() -> tuple[Any, Any, float]:
    """The HTTP client that huggingface_hub uses, its package, and seconds to wait for the next byte."""
    from huggingface_hub import constants, get_session

    seconds, http = float(constants.HF_HUB_DOWNLOAD_TIMEOUT), sys.modules[type(get_session()).__module__]
    options = {"timeout": http.Timeout(seconds, pool=None), "limits": http.Limits(max_connections=IN_FLIGHT)}
    headers = {"Accept-Encoding": "identity"}
    client = http.Client(follow_redirects=True, headers=headers, **options)
    atexit.register(client.close)
    return client, http, seconds


class RangedFile:
    """A file that is read by ranges. Thread-safe after the first read."""

    nbytes, version = 0, ""  # of the file; known after the first read

    def __init__(self, file: str) -> None:
        self.name = file  # in messages
        self.count: Callable[[int], object] = bool  # is told how many bytes arrive

    def _chunks(self, start: int, stop: int, whole: bool) -> Generator[bytes, None, None]:
        """One try of `read`; a `FailedError` says that another may help."""
        raise NotImplementedError

    def read(self, start: int, stop: int, *, whole: bool = False) -> Iterator[bytes]:
        """The bytes ``[start, stop)``, or those up to the file's end, as they arrive.

        ``whole``: all of a small file, for which a server need not know ranges. Raises an `AbsentError`, a
        `CorruptFileError` for answers that do not fit the request, and a `MachineError` if the server refuses
        or fails, or the file was replaced.
        """
        seconds = _TIMES * http_client()[2]
        mark, until, pause = start, time.monotonic() + seconds, 0.25
        while start < stop:
            failed = "the server sends too little"
            try:
                with closing(self._chunks(start, stop, whole)) as chunks:
                    for chunk in chunks:
                        self.count(len(chunk))
                        if len(chunk) > stop - start:
                            raise CorruptFileError("it sends more than was asked for", file=self.name)
                        yield chunk
                        start += len(chunk)
                        if start - mark >= _LEAST_BYTES:
                            mark, until, pause = start, time.monotonic() + seconds, 0.25
                        elif time.monotonic() > until:
                            break
                stop = min(stop, self.nbytes)
            except FailedError as error:
                failed = str(error)
            if start < stop:
                if time.monotonic() + pause > until:
                    hint = "try again later; HF_HUB_DOWNLOAD_TIMEOUT sets a sixth of this time"
                    raise MachineError(f"failing for {seconds:.0f} s: {failed}", file=self.name, hint=hint)
                time.sleep(pause)
                pause = min(2 * pause, 8)


class WebFile(RangedFile):
    """A file at an address; ``headers`` are sent to its host only."""

    def __init__(self, url: str, file: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(file)
        self._url, self._headers = url, headers or {}
        self._moved_to = url  # where redirects lead, so that they are followed once
        self._condition: dict[str, str] = {}

    def _chunks(self, start: int, stop: int, whole: bool) -> Generator[bytes, None, None]:
        client, http, _ = http_client()
        own = self._headers if urlsplit(self._moved_to)[:2] == urlsplit(self._url)[:2] else {}
        headers = {**own, **self._condition, "Range": f"bytes={start}-{stop - 1}"}
        try:
            with client.stream("GET", self._moved_to, headers=headers) as answer:
                self._check_status(answer, whole and start == 0)
                self._check_range(answer, start, stop)
                self._moved_to = str(answer.url)
                yield from answer.iter_raw()
        except http.InvalidURL as error:
            raise UsageError(f"not a usable URL: {error}", file=self.name) from error
        except http.TransportError as error:
            if isinstance(error, http.ConnectError) and not self.version:
                what, hint = "there is no connection to the server", "check the address and the network"
                raise MachineError(what, file=self.name, hint=hint) from error
            raise FailedError(type(error).__name__) from error

    def _check_status(self, answer: Any, whole: bool) -> None:
        """Raise an error unless the answer is what was asked for: a range, or a ``whole`` file."""
        status, http = answer.status_code, f"HTTP {answer.status_code}"
        expired = status in (401, 403, 404, 410) and self._moved_to != self._url  # a signed address
        if expired or status in (408, 425, 429) or status >= 500:
            self._moved_to = self._url
            raise FailedError(http)
        if status in (404, 410):
            raise AbsentError(f"there is no file at this address ({http})", file=self.name)
        if status in (401, 403):
            hint = "check the address, your credentials, and whether a signed address has expired"
            raise RefusedError(f"the server refuses to send it ({http})", file=self.name, hint=hint)
        if status not in (200, 206):
            raise replaced(self.name) if self.version else MachineError(http, file=self.name)
        what = "the server ignores ranges, so the checkpoint could only be fetched whole"
        if self._url.startswith("https:") and answer.url.scheme != "https":
            what = "the server redirects to an address without TLS"
        elif status == 206 or self.version or whole:
            return
        raise MachineError(what, file=self.name, hint=_FETCH)

    def _check_range(self, answer: Any, start: int, stop: int) -> None:
        """Raise an error unless the answer is this range of the same version of the file."""
        headers, said = answer.headers, answer.headers.get("Content-Range", "")
        if answer.status_code == 200:  # of a whole file, or because of If-Range
            length = headers.get("Content-Length", "")
            said = f"bytes 0-{int(length) - 1}/{length}" if length.isdecimal() else ""
        found, etag = _RANGE.fullmatch(said), headers.get("ETag", "")
        first, last, total = map(int, found.groups()) if found else (-1, -1, -1)
        version = etag.removeprefix("W/") or headers.get("Last-Modified", "")
        if self.version and (version, total) != (self.version, self.nbytes):
            raise replaced(self.name)
        if first != start or not start <= last < min(stop, total):
            what, asked = "the server sends another range than was asked for", f"bytes {start}-{stop - 1}"
            raise CorruptFileError(what, file=self.name, expected=asked, found=repr(said[:80]))
        if not version:
            what = "the server tells no version of the file (ETag, Last-Modified): a change would go unseen"
            raise MachineError(what, file=self.name, hint=_FETCH)
        self.nbytes, self.version = total, version
        self._condition = {"If-Range": etag} if etag.startswith('"') else {}
