"""Answers that are refused, with the HTTP client of huggingface_hub on a transport without a network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from huggingface_hub import get_session
from huggingface_hub.utils import _http

from neftsurgery.errors import CorruptFileError, MachineError
from neftsurgery.sources.hub_guard import Guard, guarded

http: Any = _http.httpx2
ADDRESS = "https://hub/org/name/resolve/main/x"


def ask(
    handler: Callable[[Any], Any], *requests: tuple[str, str], seconds: float = 10.0, running: bool = True
) -> bytes:
    """The last body, of requests by their methods and addresses; GET follows redirects."""
    guard = Guard(lambda: http.Client(transport=http.MockTransport(handler)), seconds)
    found = b""
    with guard() as client, guard.running() if running else nullcontext():
        for method, address in requests:
            found = client.request(method, address, follow_redirects=method == "GET").content
    return found


def said(body: bytes, **headers: str) -> Callable[[Any], Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: http.Response(200, headers=named, content=iter([body]))


def head_then_get(head: dict[str, str], body: bytes) -> Callable[[Any], Any]:
    """Answers HEAD with headers, and GET with a body, by way of another address if HEAD names one."""

    def answer(request: Any) -> Any:
        if request.method == "HEAD":
            return http.Response(302 if "Location" in head else 200, headers=head)
        if request.url.host == "first":
            return http.Response(302, headers={"Location": "https://second/x"})
        return http.Response(200, content=iter([body]))

    return answer


@pytest.mark.parametrize("value", ["1f" * 20, "1f" * 32, '"abc"', 'W/"abc"', "d41d8cd98f00b204-2", "v1.0"])
def test_plain_names_pass(value: str) -> None:
    assert ask(said(b"", ETag=value, X_Repo_Commit=value, X_Linked_Etag=value), ("HEAD", ADDRESS)) == b""


@pytest.mark.parametrize("header", ["X-Repo-Commit", "X-Linked-Etag", "ETag"])
@pytest.mark.parametrize("value", ["../x", '"../../x"', "a/b", "/etc/x", "..", ".x", "a\\b", "", "x" * 201])
def test_names_that_are_paths_are_refused(header: str, value: str) -> None:
    with pytest.raises(CorruptFileError, match=f"the Hub's {header} is not a plain name"):
        ask(said(b"", **{header: value}), ("HEAD", ADDRESS))


@pytest.mark.parametrize(
    "path", ["api/models/o/n/tree/..%2F..%2Fx", "api/models/o/n/tree/%2Fetc", "o/n/resolve/..%2Fx/y"]
)
def test_an_address_with_a_path_in_the_place_of_a_name_is_not_asked_for(path: str) -> None:
    with pytest.raises(CorruptFileError, match="is a path"):
        ask(said(b""), ("GET", f"https://hub/{path}"))
    assert ask(said(b"ok"), ("GET", "https://store/bucket//key")) == b"ok"  # elsewhere it may be a name
    assert ask(said(b"ok"), ("GET", "https://hub/api/models/o/n/tree/main/")) == b"ok"  # as FastAPI redirects


def test_a_body_has_the_length_that_head_told() -> None:
    for head in (
        {"Content-Length": "5"},
        {"X-Linked-Size": "5"},
        {"X-Linked-Size": "5", "Content-Length": "9"},
    ):
        assert ask(head_then_get(head, b"12345"), ("HEAD", ADDRESS), ("GET", ADDRESS)) == b"12345"
        with pytest.raises(CorruptFileError, match="a body of more than 5 B"):
            ask(head_then_get(head, b"123456"), ("HEAD", ADDRESS), ("GET", ADDRESS))


SIGNED = (
    "https://first/x?a=inline%3B+filename*%3DUTF-8%27%27x%22&Policy=a~b_&Signature=A%2Fb/c==&Key-Pair-Id=K"
)


@pytest.mark.parametrize("address", ["https://first/x", "https://first/x?", SIGNED])
def test_the_length_goes_along_with_redirects(address: str) -> None:
    head = {"X-Linked-Size": "5", "Location": address}
    requests = [("HEAD", ADDRESS), ("GET", address)]
    assert ask(head_then_get(head, b"12345"), *requests) == b"12345"
    with pytest.raises(CorruptFileError, match="a body of more than 5 B"):
        ask(head_then_get(head, b"123456"), *requests)


def test_the_rest_of_a_body_is_not_longer_than_the_rest() -> None:
    def answer(request: Any) -> Any:
        if request.method == "HEAD":
            return http.Response(200, headers={"X-Linked-Size": "5"})
        return http.Response(206, content=iter([b"3456"]))

    guard = Guard(lambda: http.Client(transport=http.MockTransport(answer)), 10.0)
    with guard() as client, guard.running():
        client.request("HEAD", ADDRESS)
        with pytest.raises(CorruptFileError, match="more than 5 B"):
            client.request("GET", ADDRESS, headers={"Range": "bytes=2-"})


def test_an_unannounced_body_ends_at_64_mib() -> None:
    def endless(request: Any) -> Any:
        return http.Response(200, content=(bytes(1 << 20) for _ in range(65)))

    with pytest.raises(CorruptFileError, match=r"a body of more than 67\.1 MB"):
        ask(endless, ("GET", "https://hub/api/models/o/n"))


def dripping(pause: float, nbytes: int) -> Callable[[Any], Any]:
    def body() -> Iterator[bytes]:
        for _ in range(6):
            time.sleep(pause)
            yield bytes(nbytes)

    return lambda request: http.Response(200, content=body())


def test_a_body_must_get_on() -> None:
    with pytest.raises(MachineError, match="too slowly"):
        ask(dripping(0.05, 1), ("GET", ADDRESS), seconds=0.1)
    assert len(ask(dripping(0.05, 2000), ("GET", ADDRESS), seconds=0.1)) == 12_000
    assert len(ask(dripping(0.001, 1), ("GET", ADDRESS), seconds=5)) == 6


def test_a_request_waits_for_a_while_and_asks_for_the_plain_file() -> None:
    waits = []

    def answer(request: Any) -> Any:
        waits.append((request.extensions["timeout"], request.headers["Accept-Encoding"]))
        return http.Response(200)

    guard = Guard(lambda: http.Client(transport=http.MockTransport(answer), timeout=None), 2.0)
    with guard() as client, guard.running():
        client.get(ADDRESS)
        client.get(ADDRESS, timeout=3.0)
    for_ever, named = ({"connect": s, "read": s, "write": s, "pool": s} for s in (60.0, 3.0))
    assert waits == [(for_ever, "identity"), (named, "identity")]


def test_a_compressed_answer_is_refused() -> None:
    """Its length would tell nothing of what is written."""
    with pytest.raises(MachineError, match="compressed"):
        ask(said(b"x", Content_Encoding="gzip"), ("GET", ADDRESS))


def test_what_others_ask_of_the_hub_is_their_own_business() -> None:
    assert ask(said(b"", ETag="../x"), ("HEAD", ADDRESS), running=False) == b""
    assert len(ask(dripping(0.05, 1), ("GET", ADDRESS), seconds=0.1, running=False)) == 6


def test_a_factory_of_the_users_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def factory() -> Any:
        made.append(http.Client(transport=http.MockTransport(said(b"", ETag="../x"))))
        return made[-1]

    monkeypatch.setattr(_http, "_GLOBAL_CLIENT", None)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", factory)
    for _ in range(2):
        with guarded(), pytest.raises(CorruptFileError, match="not a plain name"):
            get_session().head(ADDRESS)
        assert get_session().head(ADDRESS).status_code == 200
    assert made == [get_session()]
