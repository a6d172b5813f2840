"""What is behind a URL: the files of a Hub repository, of a bucket, or of a web server, which lists none."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from ..errors import UsageError
from .hub_client import client
from .hub_errors import hub_errors
from .hub_id import HubId
from .store_file import StoreFile, open_store, store_errors
from .web_file import RangedFile, WebFile


class Place(NamedTuple):
    """The files below a URL. Made by `find_place`."""

    shown: str  # the URL of the folder, without credentials
    file: Callable[[str], RangedFile]  # a file by its path below
    names: tuple[str, ...] | None = None  # the paths of all files; None if that is not known
    single: str | None = None  # the one file that the URL names
    repo: str | None = None  # org/name of a Hub repository, and the commit that is read
    revision: str | None = None


def is_url(named: object) -> bool:
    """Whether a name is a URL of a kind that is read."""
    return isinstance(named, str) and re.match("(hf|s3|gs|https?)://", named) is not None


def shown_url(url: str) -> str:
    """A URL without user, password, query and fragment, which may be credentials."""
    return re.sub(r"(?<=^http://)[^/]*@|(?<=^https://)[^/]*@|[?#].*", "", url, flags=re.DOTALL)


def find_place(url: str) -> Place:
    """Find out what a URL names: which commit, file or folder. Raises a `UsageError` if it names nothing."""
    scheme, _, path = url.partition("://")
    if scheme == "hf":
        return _on_hub(path.rstrip("/"))
    return _on_web(url) if scheme.startswith("http") else _in_bucket(scheme, unquote(path).rstrip("/"))


def _on_web(url: str) -> Place:
    parts = urlsplit(url)
    is_file = parts.path.endswith((".safetensors", ".safetensors.index.json"))
    folder, single = _split(parts.path.rstrip("/"), is_file)
    shown = shown_url(parts._replace(path=folder).geturl())

    def file(name: str) -> WebFile:
        address = parts._replace(path=f"{folder}/{quote(name)}", fragment="")
        return WebFile(address.geturl(), f"{shown}/{name}")

    return Place(shown, file, None, single and unquote(single))


def _on_hub(path: str) -> Place:
    found = re.fullmatch(r"([^/]+/[^/@]+)(@[^/]+)?(?:/(.+))?", path)
    hub_id = HubId.parse(found[1] + unquote(found[2] or "")) if found else None
    if found is None or hub_id is None:
        hint = "write it as hf://org/name[@revision][/subfolder]"
        raise UsageError("not the address of a model on the Hub", file=f"hf://{path}", hint=hint)
    with hub_errors(hub_id):
        hub = client()
        info = hub.HfApi().model_info(hub_id.repo, revision=hub_id.revision)
        headers = hub.utils.build_hf_headers()
    names, below = [one.rfilename for one in info.siblings or ()], found[3] or ""
    folder, single = _split(below, below in names)
    start = f"{folder}/" if folder else ""
    shown = f"hf://{hub_id.repo}@{info.sha}/{folder}".rstrip("/")

    def file(name: str) -> WebFile:
        address = hub.hf_hub_url(hub_id.repo, start + name, revision=info.sha)
        return WebFile(address, f"{shown}/{name}", headers)

    inside = tuple(name.removeprefix(start) for name in names if name.startswith(start))
    return Place(shown, file, inside, single, hub_id.repo, info.sha)


def _in_bucket(scheme: str, path: str) -> Place:
    with store_errors(f"{scheme}://{path}"):
        store = open_store(scheme)
        folder, single = _split(path, store.info(path)["type"] == "file")
        names = None if single else tuple(name.removeprefix(f"{folder}/") for name in store.find(folder))
    shown = f"{scheme}://{folder}"
    return Place(shown, lambda name: StoreFile(store, f"{folder}/{name}", f"{shown}/{name}"), names, single)


def _split(path: str, is_file: bool) -> tuple[str, str | None]:
    """The folder of a path, and the file in it if it is one."""
    folder, _, name = path.rpartition("/")
    return (folder, name) if is_file else (path, None)
