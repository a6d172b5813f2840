"""A web server on loopback that answers range requests for a folder, counts, and can fail and lie."""

from __future__ import annotations

import re
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class RangeServer:
    """The server: what it serves, what it sent, and how it misbehaves."""

    folder: Path
    url: str = ""
    sent: int = 0  # bytes of bodies
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # paths with queries, ranges, logins
    #: A fault, how many answers are good before it, and how many have it.
    fault: tuple[str, int, int] = ("", 0, 0)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self) -> str:
        with self.lock:
            name, good, times = self.fault
            self.fault = name, good - 1, times - (good <= 0)
            return name if good <= 0 < times else ""

    def start_count(self) -> None:
        self.sent, self.requests = 0, []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: RangeServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        state, parts = self.state, urlsplit(self.path)
        asked, login = self.headers.get("Range", ""), self.headers.get("Authorization", "")
        state.requests.append((self.path, asked, login))
        if parts.path.startswith("/moved/"):  # to another host, which must get no credentials
            there = state.url.replace("127.0.0.1", "localhost") + parts.path.removeprefix("/moved")
            return self.answer(302, headers={"Location": there})
        fault = state.next_fault()
        if fault.isdecimal():
            return self.answer(int(fault))
        path = state.folder / unquote(parts.path).lstrip("/")
        if not path.is_file():
            return self.answer(404)
        size, time_ns = path.stat().st_size, path.stat().st_mtime_ns
        tag = '"other"' if fault == "another version" else f'"{size}-{time_ns}"'
        headers = {} if fault == "no version" else {"ETag": "W/" * (fault == "weak") + tag}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if not found or fault == "ignores ranges" or self.headers.get("If-Range", tag) != tag:
            return self.answer(200, path.read_bytes(), headers)
        start, stop = int(found[1]), min(int(found[2]) + 1, size)
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(stop - start)
        if fault == "garbage":
            body = bytes(reversed(body))
        said = f"bytes {start + (fault == 'another range')}-{stop - 1}/{size + (fault == 'another size')}"
        return self.answer(206, body, headers | {"Content-Range": said}, fault)

    def answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, fault: str = ""
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = bool(fault)
        if fault in ("short", "stalls"):
            body = body[: len(body) // 2]
        with self.state.lock:
            self.state.sent += len(body)
        if fault == "drips":
            for place in range(len(body)):
                self.wfile.write(body[place : place + 1])
                time.sleep(0.02)
        else:
            self.wfile.write(body)
        if fault == "stalls":
            self.wfile.flush()
            time.sleep(1)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client has left
            self.close_connection = True


@contextmanager
def range_server(folder: Path, certificate: Path | None = None) -> Iterator[RangeServer]:
    """Serve a folder while the context lasts; over TLS with what `make_certificate` wrote."""
    state = RangeServer(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    server.daemon_threads = True
    server.block_on_close = False
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    state.url = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def make_certificate(path: Path) -> Path:
    """Write a certificate of this machine that signs itself, and its key beside it."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x"
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    files = ["-out", str(path), "-keyout", str(path.with_suffix(".key"))]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    return path
