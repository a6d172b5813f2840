"""Servers on loopback: a web server whose files the kernel sends, so that it takes little time; and S3."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.folder / self.path.lstrip("/")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not path.is_file() or not asked:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = path.stat().st_size
        start, stop = int(asked[1]), min(int(asked[2]) + 1, size)
        self.send_response(206)
        self.send_header("ETag", f'"{size}-{path.stat().st_mtime_ns}"')
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.flush()
        with path.open("rb") as file:
            self.connection.sendfile(file, start, stop - start)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder, which a process of its own serves while the context lasts."""
    command = [sys.executable, "-m", "benchmarks.harness.servers", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@contextmanager
def stored(folder: Path) -> Iterator[str]:
    """The address of a bucket of moto's S3 server that holds a folder; the environment names the server."""
    import boto3

    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = iter(process.stderr)
            found = next(filter(None, (re.search(r"http://127.0.0.1:\d+", line) for line in said)))
            threading.Thread(target=lambda: [*said], daemon=True).start()  # what it logs of each request
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                os.environ[name] = "none"
            os.environ |= {"AWS_ENDPOINT_URL": found[0], "AWS_DEFAULT_REGION": "us-east-1"}
            client = boto3.client("s3")
            client.create_bucket(Bucket="models")
            for path in filter(Path.is_file, folder.rglob("*")):
                client.upload_file(str(path), "models", str(path.relative_to(folder)))
            yield "s3://models"
        finally:
            process.terminate()


def main() -> None:
    handler = type("Handler", (_Handler,), {"folder": Path(sys.argv[1])})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
