"""A file behind an ``https://`` address, read by ranges. Answers are checked; what fails is tried again.

A server that ignores ranges is refused: a file is never fetched whole because a part of it was asked for.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from ..errors import CorruptFileError, MachineError, UsageError
from ..version import __version__

#: Ranges that are asked for at the same time, by all threads together.
IN_FLIGHT = 24
_LEAST_BYTES = 64 << 10  # that must arrive while there is patience, or all of a shorter range
_PATIENCE = 6  # times as long as for the next byte
_FETCH = "fetch the checkpoint, and name the local folder"
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class AbsentError(UsageError):
    """There is no file at an address."""


class RefusedError(MachineError):
    """A server does not let this user read a file, or does not say that there is none."""


class _FailedError(Exception):
    """An answer that another try may improve."""


class Patience:
    """How long a range may take, with all that is tried again. A call notes how far reading has come."""

    def __init__(self, file: str) -> None:
        from huggingface_hub import constants

        self._file, self._seconds = file, _PATIENCE * float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        self._mark = self._pause = self._until = 0.0

    def __call__(self, position: int, failed: str = "") -> None:
        """Wait before another try, if the last has ``failed``. A `MachineError` says that time is up."""
        now = time.monotonic()
        if not self._until or position - self._mark >= _LEAST_BYTES:
            self._mark, self._pause, self._until = position, 0.25, now + self._seconds
        if now + (self._pause if failed else 0) > self._until:
            what = f"less than {_LEAST_BYTES >> 10} kB came in {self._seconds:.0f} s"
            hint = "try again later; of HF_HUB_DOWNLOAD_TIMEOUT seconds, this took six times as many"
            raise MachineError(f"{what}: {failed or 'the server is too slow'}", file=self._file, hint=hint)
        if failed:
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, 8)


def replaced(file: str) -> MachineError:
    """The error for a file that is not the one whose header was read."""
    hint = "run the command again when nothing writes there"
    return MachineError("the file was replaced while it was read", file=file, hint=hint)


def _http() -> ModuleType:
    """The HTTP client's package; by which name depends on the version of huggingface_hub."""
    import huggingface_hub

    return import_module(type(huggingface_hub.get_session()).__module__.partition(".")[0])


@functools.cache
def _client() -> Any:
    from huggingface_hub import constants

    http = _http()
    return http.Client(
        follow_redirects=True,
        timeout=http.Timeout(float(constants.HF_HUB_DOWNLOAD_TIMEOUT), pool=None),
        limits=http.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT),
        headers={"User-Agent": f"neftsurgery/{__version__}", "Accept-Encoding": "identity"},
    )


class WebFile:
    """A file at an address. Its size is known, and it is thread-safe, after the first read."""

    def __init__(self, url: str, file: str, headers: Mapping[str, str] | None = None) -> None:
        self._url, self._file, self._headers = url, file, dict(headers or {})
        self._moved_to = url  # where redirects lead, so that they are followed once
        self._version: tuple[int, str] | None = None  # size, and ETag or time of the last change
        self._condition: dict[str, str] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return 0 if self._version is None else self._version[0]

    def read(self, start: int, stop: int, put: Callable[[bytes], object], *, whole: bool = False) -> None:
        """Give ``put`` the bytes ``[start, stop)`` one after the other, or those up to the file's end.

        ``whole``: all of a small file, for which a server need not know ranges. Raises an `AbsentError`, a
        `CorruptFileError` for answers that do not fit the request, and a `MachineError` if the server refuses
        or fails, or the file was replaced.
        """
        patience, http = Patience(self._file), _http()
        while start < stop:
            failed = "the body is too short"
            try:
                for chunk in self._body(start, stop, whole):
                    if len(chunk) > stop - start:
                        raise CorruptFileError("the server sends more than was asked for", file=self._file)
                    put(chunk)
                    start += len(chunk)
                    patience(start)
                stop = min(stop, self.nbytes)
            except (http.TransportError, _FailedError) as error:
                failed = str(error) if isinstance(error, _FailedError) else type(error).__name__
                if self._version is None and isinstance(error, http.ConnectError):
                    what, hint = "there is no connection to the server", "check the address and the network"
                    raise MachineError(what, file=self._file, hint=hint) from None
            if start < stop:
                patience(start, failed)

    def _body(self, start: int, stop: int, whole: bool) -> Iterator[bytes]:
        url = self._moved_to
        own = self._headers if urlsplit(url)[:2] == urlsplit(self._url)[:2] else {}
        headers = {**own, **self._condition, "Range": f"bytes={start}-{stop - 1}"}
        with _client().stream("GET", url, headers=headers) as answer:
            self._check_status(answer, whole and start == 0)
            self._check_range(answer, start, stop)
            self._moved_to = str(answer.url)
            yield from answer.iter_raw()

    def _check_status(self, answer: Any, whole: bool) -> None:
        """Raise an error unless the answer is what was asked for: a range, or a ``whole`` file."""
        status = answer.status_code
        if status in (401, 403, 404, 410) and self._moved_to != self._url:
            self._moved_to = self._url  # a signed address has expired
            raise _FailedError(f"HTTP {status}")
        if status in (404, 410):
            raise AbsentError(f"there is no file at this address (HTTP {status})", file=self._file)
        if status in (401, 403):
            hint = "check the address, your credentials, and whether a signed address has expired"
            raise RefusedError(f"the server refuses to send it (HTTP {status})", file=self._file, hint=hint)
        if status in (408, 425, 429) or status >= 500:
            raise _FailedError(f"HTTP {status}")
        if self._url.startswith("https:") and answer.url.scheme != "https":
            raise MachineError("the server redirects to an address without TLS", file=self._file, hint=_FETCH)
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise MachineError("the server sends a compressed body, which was not asked for", file=self._file)
        if status == 200 and self._version is None and not whole:
            what = "the server ignores ranges, so the checkpoint could only be fetched whole"
            raise MachineError(what, file=self._file, hint=_FETCH)
        if status not in (200, 206):
            raise replaced(self._file) if self._version else MachineError(f"HTTP {status}", file=self._file)

    def _check_range(self, answer: Any, start: int, stop: int) -> None:
        """Raise an error unless the answer is this range of the same version of the file."""
        headers, said = answer.headers, answer.headers.get("Content-Range", "")
        if answer.status_code == 200:  # of a whole file, or because of If-Range
            length = headers.get("Content-Length", "")
            said = f"bytes 0-{int(length) - 1}/{length}" if length.isdecimal() else ""
        found, etag = _RANGE.fullmatch(said), headers.get("ETag", "")
        first, last, total = map(int, found.groups()) if found else (-1, -1, -1)
        mark = etag.removeprefix("W/") or headers.get("Last-Modified", "")
        if self._version is not None and (mark, total) != (self._version[1], self._version[0]):
            raise replaced(self._file)
        if first != start or not start <= last < min(stop, total):
            what = "the server sends another range than was asked for"
            asked = f"bytes {start}-{stop - 1}"
            raise CorruptFileError(what, file=self._file, expected=asked, found=repr(said[:80]))
        if not mark:
            what = "the server tells no version of the file (ETag, Last-Modified): a change would go unseen"
            raise MachineError(what, file=self._file, hint=_FETCH)
        self._version = (total, mark)
        self._condition = {"If-Range": etag} if etag.startswith('"') else {}
