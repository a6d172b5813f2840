"""A Hub on loopback, in its own process: it answers the calls of huggingface_hub from repositories in memory.

``python hub_server.py`` prints its address. It is told what to do at ``/_control`` (JSON): make a repository,
fail the next calls that match, hold them; and tells at ``/_state`` what it holds and which calls came.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import Commit, Hub, Repo, blob_name, card_data, is_lfs

#: Users by token. Other tokens are refused, as on the Hub.
USERS = {
    "hf_writerwriterwriter": "writer",
    "hf_readerreaderreader": "reader",
    "plainsecretplainsecret": "writer",
}
SIGNATURE = "X-Amz-Signature=5ec2e75167a7u2e"
ZEROS = bytes(1 << 20)


HUB = Hub()


class Refusal(Exception):
    def __init__(self, status: int, code: str | None = None, message: str | None = None) -> None:
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fault: dict[str, Any] | None = None  # the lie that this call gets
    disable_nagle_algorithm = True  # else every answer waits until the client has acknowledged the header

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def answer(self, method: str) -> None:
        self.fault, parts = None, urlsplit(self.path)
        self.method, self.route, self.query = method, unquote(parts.path), parse_qs(parts.query)
        if self.route == "/_control":
            return self.control()
        if self.route == "/_state":
            with HUB.lock:
                return self.reply(HUB.state())
        with HUB.lock:
            HUB.calls.append(f"{method} {self.route}")
            if self.route.startswith("/_storage") and self.headers.get("Authorization"):
                HUB.calls.append("a token was sent to the storage")
            self.fault, generation = self.matching(), HUB.generation
        if self.fault and "hold" in self.fault:
            HUB.released.wait()
            if generation != HUB.generation:
                return self.hang_up()
        if self.fault and "cut_upload" in self.fault:  # read half of the upload, then drop the connection
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self.hang_up()
        body = self.body()
        try:
            if self.fault and "status" in self.fault:
                raise Refusal(self.fault["status"], self.fault.get("code"), self.fault.get("message"))
            if self.fault and self.fault.keys() & {"drip", "endless"}:  # the others must not wait for it
                return self.dispatch(method, body)
            with HUB.lock:
                self.dispatch(method, body)
        except Refusal as refusal:
            self.refuse(refusal)
        return None

    def matching(self) -> dict[str, Any] | None:
        for fault in HUB.faults:
            if fault["times"] > 0 and re.search(fault["match"], f"{self.method} {self.route}"):
                fault["times"] -= 1
                return fault
        return None

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def hang_up(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def reply(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        lie = self.fault or {}
        if isinstance(value, dict):
            value = value | lie.get("fields", {})
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        data = lie["body"].encode() if "body" in lie else data
        headers = (headers or {}) | {"Content-Length": str(len(data))}
        if "endless" in lie:
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = "chunked"
        self.send_response(status)
        for name, text in (headers | lie.get("headers", {})).items():
            if text is not None:
                self.send_header(name, text)
        self.end_headers()
        if self.method == "HEAD":
            return
        if "drip" in lie:
            for place in range(len(data)):
                self.wfile.write(data[place : place + 1])
                self.wfile.flush()
                time.sleep(lie["drip"])
        elif "endless" in lie:
            self.chunk(data)
            for _ in range(lie["endless"]):
                HUB.sent["too much"] = HUB.sent.get("too much", 0) + len(ZEROS)
                self.chunk(ZEROS)
            self.chunk(b"")
        else:
            self.wfile.write(data)

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def refuse(self, refusal: Refusal) -> None:
        headers = {"Retry-After": "0"} if refusal.status in (429, 500, 502, 503, 504) else {}
        headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
        # The worst that a server can do: repeat what it was told, secrets included.
        said = refusal.message or f"no: {self.headers.get('Authorization')} https://cdn/x?{SIGNATURE}"
        self.reply(
            {"error": said, "errors": [{"message": said}]},
            refusal.status,
            headers | {"X-Error-Message": said},
        )

    # What the Hub does.

    def user(self) -> str | None:
        kind, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if not kind:
            return None
        if token not in USERS:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return USERS[token]

    def dispatch(self, method: str, body: bytes) -> None:
        user = self.user()
        for verb, pattern, handler in ROUTES:
            if verb == method and (match := re.fullmatch(pattern, self.route)):
                return handler(self, user, body, *match.groups())
        raise Refusal(404, None, "no such page")

    def repo(self, name: str, user: str | None, *, write: bool = False) -> Repo:
        repo = HUB.repos.get(name)
        if repo is None or (repo.private and user != "writer"):
            raise Refusal(404 if user else 401, "RepoNotFound")
        if write and user != "writer":
            raise Refusal(403 if user else 401, None, "you may not write here")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        commit = repo.commit_of(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound")
        return commit

    def whoami(self, user: str | None, body: bytes) -> None:
        if user is None:
            raise Refusal(401)
        self.reply({"name": user, "type": "user", "orgs": []})

    def create(self, user: str | None, body: bytes) -> None:
        asked = json.loads(body)
        if user != "writer":
            raise Refusal(403 if user else 401, None, "you may not write here")
        name = f"{asked['organization']}/{asked['name']}"
        if name in HUB.repos:
            raise Refusal(409, None, "You already created this model repo")
        HUB.make(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.reply({"url": f"{address()}/{name}", "name": name})

    def validate(self, user: str | None, body: bytes) -> None:
        data = card_data(json.loads(body)["content"])
        if not isinstance(data, dict) or not isinstance(data.get("tags", []), list):
            raise Refusal(400, None, "front matter is not an object")
        if data.get("license") == "refuse-me":
            return self.reply(
                {"errors": [{"message": '"license" must be one of a list'}], "warnings": []}, 400
            )
        return self.reply({"errors": [], "warnings": []})

    def info(self, user: str | None, body: bytes, name: str, revision: str | None = None) -> None:
        repo = self.repo(name, user)
        commit = self.commit_of(repo, revision or "main")
        self.reply(
            {
                "id": name,
                "modelId": name,
                "sha": commit.oid,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "cardData": card_data(
                    HUB.blobs.get(commit.files.get("README.md", ""), b"").decode(errors="replace")
                ),
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
                "tags": [],
                "downloads": 0,
            }
        )

    def tree(self, user: str | None, body: bytes, name: str, revision: str) -> None:
        commit = self.commit_of(self.repo(name, user), revision)
        entries = []
        for path, blob in sorted(commit.files.items()):
            entry: dict[str, Any] = {
                "type": "file",
                "path": path,
                "oid": blob[:40],
                "size": len(HUB.blobs[blob]),
            }
            if is_lfs(path):
                entry["lfs"] = {"oid": blob, "size": len(HUB.blobs[blob]), "pointerSize": 128}
            entries.append(entry)
        self.reply(entries)

    def branch(self, user: str | None, body: bytes, name: str, branch: str) -> None:
        repo = self.repo(name, user, write=True)
        if branch in repo.refs:
            raise Refusal(409, None, "Reference already exists")
        repo.refs[branch] = self.commit_of(repo, json.loads(body or b"{}").get("startingPoint", "main")).oid
        self.reply({})

    def preupload(self, user: str | None, body: bytes, name: str, revision: str) -> None:
        repo = self.repo(name, user, write=True)
        files = self.commit_of(repo, revision).files
        self.reply(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if is_lfs(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": files.get(file["path"]),
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def batch(self, user: str | None, body: bytes, name: str) -> None:
        repo = self.repo(name, user, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            found: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in repo.lfs:
                href = f"{storage()}/{name}/{asked['oid']}?{SIGNATURE}"
                verify = f"{address()}/{name}.git/info/lfs/verify"
                found["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            objects.append(found)
        self.reply({"transfer": "basic", "objects": objects})

    def store(self, user: str | None, body: bytes, name: str, oid: str) -> None:
        if SIGNATURE not in self.path:
            raise Refusal(403)
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, None, "content does not match")
        HUB.blobs[oid] = body
        HUB.repos[name].lfs.add(oid)
        self.reply(b"")

    def verify(self, user: str | None, body: bytes, name: str) -> None:
        asked = json.loads(body)
        if len(HUB.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404)
        self.reply({})

    def write(self, user: str | None, body: bytes, name: str, revision: str) -> None:
        repo = self.repo(name, user, write=True)
        head = self.commit_of(repo, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, head.oid):
            raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
        named = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                named[value["path"]] = blob_name(value["path"], content)
                HUB.blobs[named[value["path"]]] = content
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.lfs:
                    raise Refusal(400, None, "LFS object is missing")
                named[value["path"]] = value["oid"]
        if self.fault and self.fault.get("no_commit"):  # as if all files were there
            commit = head
        else:
            commit = HUB.commit(repo, revision, named, header["summary"])
        self.reply({"commitUrl": f"{address()}/{name}/commit/{commit.oid}", "commitOid": commit.oid})

    def resolve(self, user: str | None, body: bytes, name: str, revision: str, path: str) -> None:
        repo = self.repo(name, user)
        if repo.gated and user != "writer":
            raise Refusal(403 if user else 401, "GatedRepo")
        commit = self.commit_of(repo, revision)
        if path not in commit.files:
            return self.reply(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid})
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob}"', "Accept-Ranges": "bytes"}
        if is_lfs(path):  # stored elsewhere, at a signed address
            headers |= {"X-Linked-Etag": f'"{blob}"', "X-Linked-Size": str(len(HUB.blobs[blob]))}
            headers["Location"] = f"{storage()}/{name}/{blob}?{SIGNATURE}"
            return self.reply(b"", 302, headers)
        return self.send(HUB.blobs[blob], headers, path)

    def fetch(self, user: str | None, body: bytes, name: str, oid: str) -> None:
        if SIGNATURE not in self.path:
            raise Refusal(403)
        self.send(HUB.blobs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, oid)

    def send(self, data: bytes, headers: dict[str, str], what: str) -> None:
        if self.fault and self.fault.get("other"):
            data = HUB.blobs[self.fault["other"]]
        if self.fault and self.fault.get("corrupt"):
            data = data[:-1] + bytes([data[-1] ^ 1])
        start, status = 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(found[1]), min(int(found[2] or len(data) - 1) + 1, len(data))
            if start >= len(data):
                return self.reply(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
            headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            data, status = data[start:stop], 206
        if self.fault and "cut_download" in self.fault and self.method == "GET":
            part = data[: int(len(data) * self.fault["cut_download"])]
            HUB.sent[what] = HUB.sent.get(what, 0) + len(part)
            self.send_response(status)
            for key, text in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, text)
            self.end_headers()
            self.wfile.write(part)
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)
            return None
        if self.method == "GET":
            HUB.sent[what] = HUB.sent.get(what, 0) + len(data)
        return self.reply(data, status, headers)

    # What tests ask of it.

    def control(self) -> None:
        asked = json.loads(self.body())
        with HUB.lock:
            match asked.pop("do"):
                case "release":
                    HUB.released.set()
                    answer: object = {}
                case "reset":
                    HUB.released.set()
                    HUB.generation += 1
                    HUB.released = threading.Event()
                    HUB.repos.clear()
                    HUB.blobs.clear()
                    HUB.faults.clear()
                    HUB.calls.clear()
                    HUB.sent.clear()
                    answer = {}
                case "make":
                    files = {path: base64.b64decode(text) for path, text in asked.pop("files", {}).items()}
                    name = asked.pop("name")
                    repo = HUB.repos.get(name) or HUB.make(name, **asked)
                    answer = HUB.add(repo, "main", files, "by hand").oid if files else repo.refs["main"]
                case "read":
                    repo = HUB.repos[asked["name"]]
                    commit = repo.commit_of(asked.get("revision", "main"))
                    assert commit is not None
                    answer = base64.b64encode(HUB.blobs[commit.files[asked["path"]]]).decode()
                case "fault":
                    HUB.faults.append({"times": 1, **asked})
                    answer = {}
                case _:
                    answer = None
        self.method = "POST"
        self.reply(answer)


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{NAME}/revision/(.+)", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Handler.write),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/{NAME}\.git/info/lfs/verify", Handler.verify),
    ("PUT", f"/_storage/{NAME}/([0-9a-f]+)", Handler.store),
    ("GET", f"/_storage/{NAME}/([0-9a-f]+)", Handler.fetch),
    ("HEAD", f"/_storage/{NAME}/([0-9a-f]+)", Handler.fetch),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]

SERVER: list[ThreadingHTTPServer] = []


def address() -> str:
    return f"http://127.0.0.1:{SERVER[0].server_port}"


def storage() -> str:
    """Where large files are stored. For a client this is another host, to which no token may be sent."""
    return f"http://localhost:{SERVER[0].server_port}/_storage"


def main() -> None:
    SERVER.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
    SERVER[0].daemon_threads = True
    print(address(), flush=True)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    SERVER[0].serve_forever()


def _leave_with_parent() -> None:
    """End when standard input closes: the process that started the server has ended."""
    sys.stdin.read()
    SERVER[0].shutdown()


if __name__ == "__main__":
    main()
