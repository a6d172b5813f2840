"""Files in buckets: errors of drivers. With real drivers and a real server: tests/field/test_stores.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import save

from neftsurgery.errors import MachineError, NeftError, UsageError
from neftsurgery.sources.places import find_place
from neftsurgery.sources.resolve import resolve
from neftsurgery.sources.store_file import StoreFile
from neftsurgery.sources.web_file import RefusedError, http_client


class FileExpired(OSError):
    """As s3fs raises it for an object with another ETag."""


class Store(MemoryFileSystem):
    """A bucket in memory whose files can fail when they are read."""

    protocol = ("s3",)
    store: ClassVar[dict[str, Any]] = {}
    failures: Sequence[Exception] = ()


class _File:
    def __init__(self, store: Store, data: bytes) -> None:
        self.size, self._store, self._data = len(data), store, data

    def _fetch_range(self, start: int, stop: int) -> bytes:
        if self._store.failures:
            first, *self._store.failures = self._store.failures
            raise first
        return self._data[start:stop]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    made.pipe("/bucket/m/model.safetensors", save({"w": np.arange(12, dtype=np.float32)}))
    made.pipe("/bucket/m/config.json", b"{}")
    opened = lambda path, *mode, **options: _File(made, made.cat(path))  # noqa: E731
    monkeypatch.setattr(made, "open", opened)
    monkeypatch.setattr(fsspec, "filesystem", lambda *scheme, **options: made)
    return made


def read(store: Store, failures: Sequence[Exception]) -> bytes:
    """A file, the reads of whose second byte fail so often."""
    file = StoreFile(store, "/bucket/m/config.json", "s3://bucket/m/config.json")
    first = b"".join(file.read(0, 1))
    store.failures = failures
    return first + b"".join(file.read(1, 100))


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (PermissionError("Access Denied"), RefusedError, "access is refused: Access Denied"),
        (type("NoCredentialsError", (Exception,), {})("x"), RefusedError, "access is refused"),
        (FileNotFoundError("gone"), MachineError, "replaced while it was read"),
        (FileExpired("other ETag"), MachineError, "replaced while it was read"),
    ],
)
def test_failure(store: Store, failure: Exception, kind: type[NeftError], words: str) -> None:
    with pytest.raises(kind, match=words):
        read(store, [failure])


def test_failures_that_pass(store: Store) -> None:
    assert read(store, [TimeoutError("slow"), OSError(5, "the socket")]) == b"{}"


def test_failure_that_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    http_client()[0].close()
    http_client.cache_clear()
    with pytest.raises(MachineError, match="see https://host/x") as raised:
        read(store, 100 * [OSError(5, "see https://host/x?token=secret")])
    assert "secret" not in str(raised.value)
    http_client.cache_clear()


def test_folder_and_file(store: Store) -> None:
    folder, file = find_place("s3://bucket/m/"), find_place("s3://bucket/m/model.safetensors")
    assert (folder.shown, folder.single) == ("s3://bucket/m", None)
    assert (file.shown, file.names, file.single) == ("s3://bucket/m", None, "model.safetensors")
    with pytest.raises(UsageError, match="no file or folder at this address"):
        find_place("s3://bucket/nothing")


def test_driver_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*scheme: str, **options: object) -> None:
        raise ImportError("install s3fs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UsageError, match="reading gs:// needs gcsfs") as raised:
        resolve("gs://bucket/m")
    assert raised.value.hint == "in a clone of neftsurgery: pip install '.[remote]'"
