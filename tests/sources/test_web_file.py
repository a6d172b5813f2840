"""Files behind https:// addresses: faults of servers and of what is between, and credentials."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from range_server import RangeServer, make_certificate, range_server
from support import write_file

from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.errors import CorruptFileError, MachineError, NeftError, UsageError
from neftsurgery.sources.remote import FETCHED
from neftsurgery.sources.web_file import WebFile, http_client

WEIGHT = np.arange(60_000, dtype=np.float32).reshape(300, 200)


def new_client() -> None:
    """Have the next request make a client, with what the environment says then."""
    http_client()[0].close()
    http_client.cache_clear()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    """A server with one file."""
    write_file(tmp_path / "w.safetensors", {"w": WEIGHT})
    with range_server(tmp_path) as state:
        yield state


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A client that waits a tenth of a second for a byte."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    new_client()
    yield
    new_client()


def read(server: RangeServer) -> np.ndarray:
    """The weight, read through a checkpoint: first a header and a config, then ranges."""
    found = np.empty_like(WEIGHT)
    Checkpoint.open(f"{server.url}/w.safetensors").read_into("w", 0, found.data.cast("B"))
    return found


ALWAYS = 1 << 20
#: The fault; answers before it; the class and the words of the error.
FAULTS: list[tuple[str, int, type[NeftError], str]] = [
    ("404", 0, UsageError, "no file at this address"),
    ("401", 0, MachineError, "refuses to send it .HTTP 401"),
    ("403", 0, MachineError, "refuses to send it .HTTP 403"),
    ("403", 2, MachineError, "refuses to send it .HTTP 403"),
    ("418", 0, MachineError, "HTTP 418"),
    ("503", 0, MachineError, "failing for 1 s: HTTP 503"),
    ("503", 2, MachineError, "failing for 1 s: HTTP 503"),
    ("ignores ranges", 0, MachineError, "the server ignores ranges"),
    ("ignores ranges", 2, CorruptFileError, "another range"),
    ("no version", 0, MachineError, "tells no version of the file"),
    ("another range", 0, CorruptFileError, "another range than was asked for"),
    ("another range", 2, CorruptFileError, "another range than was asked for"),
    ("another size", 0, CorruptFileError, "not a valid safetensors file"),
    ("another size", 2, MachineError, "the file was replaced"),
    ("another version", 2, MachineError, "the file was replaced"),
    ("garbage", 0, CorruptFileError, "not a valid safetensors file"),
    ("short", 2, MachineError, "failing for 1 s"),
    ("stalls", 2, MachineError, "failing for 1 s: ReadTimeout"),
    ("drips", 2, MachineError, "failing for 1 s: the server sends too little"),
]


@pytest.mark.parametrize(("fault", "good", "kind", "words"), FAULTS)
@pytest.mark.usefixtures("impatient")
def test_fault(server: RangeServer, fault: str, good: int, kind: type[NeftError], words: str) -> None:
    server.fault = fault, good, ALWAYS
    FETCHED.clear()
    with pytest.raises(kind, match=words) as raised:
        read(server)
    assert raised.value.file == f"{server.url}/w.safetensors"
    if fault == "ignores ranges":
        assert FETCHED[0].nbytes <= 64 << 10  # the header at most


@pytest.mark.parametrize("fault", ["503", "429", "short", "stalls"])
def test_passing_fault(server: RangeServer, fault: str) -> None:
    server.fault = fault, 2, 1
    assert np.array_equal(read(server), WEIGHT)


def test_weak_etag_is_compared(server: RangeServer) -> None:
    server.fault = "weak", 0, ALWAYS
    assert np.array_equal(read(server), WEIGHT)


def test_replaced_file_is_noticed(server: RangeServer) -> None:
    checkpoint, found = Checkpoint.open(f"{server.url}/w.safetensors"), np.empty_like(WEIGHT)
    write_file(server.folder / "w.safetensors", {"w": WEIGHT + 1})
    with pytest.raises(MachineError, match="the file was replaced while it was read"):
        checkpoint.read_into("w", 0, found.data.cast("B"))


def test_no_connection_is_told_at_once(tmp_path: Path) -> None:
    with range_server(tmp_path) as state:
        pass
    with pytest.raises(MachineError, match="no connection to the server"):
        read(state)


def test_credentials_are_sent_to_the_first_host_only(server: RangeServer) -> None:
    file = WebFile(f"{server.url}/moved/w.safetensors", "w", {"Authorization": "Bearer secret"})
    found = b"".join(file.read(0, 100)) + b"".join(file.read(100, 200))
    assert found == (server.folder / "w.safetensors").read_bytes()[:200]
    logins = [(path, login) for path, _, login in server.requests]
    assert logins == [("/moved/w.safetensors", "Bearer secret")] + 2 * [("/w.safetensors", "")]


def test_address_that_expires_is_asked_for_again(server: RangeServer) -> None:
    file = WebFile(f"{server.url}/moved/w.safetensors", "w")
    found = b"".join(file.read(0, 100))
    server.fault = "403", 0, 1
    found += b"".join(file.read(100, 200))
    assert found == (server.folder / "w.safetensors").read_bytes()[:200]
    assert [path for path, *_ in server.requests].count("/moved/w.safetensors") == 2


def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "w.safetensors", {"w": WEIGHT})
    certificate = make_certificate(tmp_path / "server.pem")
    new_client()
    with range_server(tmp_path, certificate) as state:
        with pytest.raises(MachineError, match="no connection"):  # the certificate is not known
            read(state)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        new_client()
        assert np.array_equal(read(state), WEIGHT)
    new_client()
