"""A file in a bucket, read by ranges through the driver that fsspec has for it: s3fs or gcsfs.

The driver brings names, credentials and the requests themselves. The version is the one that was there when
the file was opened: by its ETag in S3, by its generation in Google's storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from ..errors import MachineError, NeftError, UsageError
from ..text import printable
from .hub_errors import redacted
from .web_file import AbsentError, Patience, RefusedError, replaced

_RIGHTS = (
    "check the credentials that the driver finds, and their rights (AWS_PROFILE; `gcloud auth login`); for a "
    "public bucket set FSSPEC_S3_ANON=true or FSSPEC_GCS_TOKEN=anon"
)


def open_store(scheme: str) -> Any:
    """The driver of fsspec for ``s3`` or ``gs``; it caches no listings, which could be stale."""
    try:
        import fsspec

        options = {} if scheme == "s3" else {"version_aware": True}
        return fsspec.filesystem(scheme, use_listings_cache=False, **options)
    except ImportError as error:
        driver, hint = "s3fs" if scheme == "s3" else "gcsfs", "pip install 'neftsurgery[remote]'"
        raise UsageError(f"reading {scheme}:// needs {driver}, which is not there", hint=hint) from error


@contextmanager
def store_errors(file: str) -> Iterator[None]:
    """Turn what drivers raise into errors of this package, about ``file``."""
    try:
        yield
    except NeftError:
        raise
    except FileNotFoundError as error:
        raise AbsentError("there is no file or folder at this address", file=file) from error
    except Exception as error:  # each driver has its own, and so have the clients below them
        kind, said = type(error).__name__, printable(redacted(str(error).partition("\n")[0]))[:200]
        if isinstance(error, PermissionError) or "Credential" in kind:
            raise RefusedError(f"access is refused: {said}", file=file, hint=_RIGHTS) from error
        raise MachineError(f"reading failed: {kind}: {said}", file=file) from error


class StoreFile:
    """A file in a bucket. Thread-safe after the first read."""

    def __init__(self, store: Any, path: str, file: str) -> None:
        self._store, self._path, self._file = store, path, file

    @cached_property
    def _handle(self) -> Any:
        """The file, opened by the driver, which notes its version."""
        with store_errors(self._file):
            generation = self._store.info(self._path).get("generation")
            path = f"{self._path}#{generation}" if generation else self._path
            return self._store.open(path, "rb", cache_type="none")

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return int(self._handle.size)

    def read(self, start: int, stop: int, put: Callable[[bytes], object], *, whole: bool = False) -> None:
        """As of `neftsurgery.sources.web_file.WebFile`."""
        patience, stop = Patience(self._file), min(stop, self.nbytes)
        while start < stop:
            failed = "the body is too short"
            try:
                with store_errors(self._file):
                    found = self._handle._fetch_range(start, stop)  # what a driver of fsspec defines
                put(found[: stop - start])
                start += len(found)
            except (AbsentError, RefusedError) as error:  # it was there
                raise (replaced(self._file) if isinstance(error, AbsentError) else error) from error
            except MachineError as error:
                if type(error.__cause__).__name__ == "FileExpired":
                    raise replaced(self._file) from error
                failed = error.what
            if start < stop:
                patience(start, failed)
