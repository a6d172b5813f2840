"""A file in a bucket, read by ranges through the driver that fsspec has for it: s3fs or gcsfs.

Its version is the one that was there when it was opened: by ETag in S3, by generation in Google's storage.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from ..errors import MachineError, NeftError, UsageError
from ..text import printable
from ..version import install_command
from .hub_errors import redacted
from .web_file import AbsentError, FailedError, RangedFile, RefusedError, replaced

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
        driver, hint = "s3fs" if scheme == "s3" else "gcsfs", install_command("remote")
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


class StoreFile(RangedFile):
    """A file in a bucket."""

    def __init__(self, store: Any, path: str, file: str) -> None:
        super().__init__(file)
        self._store, self._path = store, path

    @cached_property
    def _handle(self) -> Any:
        """The file, opened by the driver, which notes its version."""
        facts = self._store.info(self._path)
        generation = facts.get("generation")
        self.version = f"{generation or facts.get('ETag')}"
        path = f"{self._path}#{generation}" if generation else self._path
        return self._store.open(path, "rb", cache_type="none")

    def _chunks(self, start: int, stop: int, whole: bool) -> Generator[bytes, None, None]:
        known = self.nbytes > 0
        try:
            with store_errors(self.name):
                self.nbytes = self._handle.size
                yield self._handle._fetch_range(start, min(stop, self.nbytes))  # as all drivers of fsspec do
        except (AbsentError, MachineError) as error:
            if type(error.__cause__).__name__ == "FileExpired" or (known and isinstance(error, AbsentError)):
                raise replaced(self.name) from error
            if isinstance(error, (AbsentError, RefusedError)):
                raise
            raise FailedError(error.what) from error
