"""What is behind a URL: the files of a Hub repository, of a bucket, or of a web server, which lists none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from ..errors import UsageError
from .hub_client import client
from .hub_errors import hub_errors
from .hub_id import HubId
from .store_file import StoreFile, open_store, store_errors
from .web_file import WebFile

_URL = re.compile(r"(hf|s3|gs|https?)://")


@dataclass(frozen=True)
class Place:
    """The files below a URL. Made by `find_place`."""

    shown: str  # the URL of the folder, without credentials
    file: Callable[[str], WebFile | StoreFile]  # a file by its path below
    names: tuple[str, ...] | None  # the paths of all files; None if that is not known
    single: str | None = None  # the one file that the URL names
    repo: str | None = None  # org/name of a Hub repository
    revision: str | None = None  # the commit that is read


def is_url(named: object) -> bool:
    """Whether a name is a URL of a kind that is read."""
    return isinstance(named, str) and _URL.match(named) is not None


def shown_url(url: str) -> str:
    """A URL without user, password, query and fragment, which may be credentials."""
    scheme, _, rest = re.sub(r"[?#].*", "", url, flags=re.DOTALL).partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2] if scheme.startswith('http') else host}{slash}{path}"


def find_place(url: str) -> Place:
    """Find out what a URL names: which commit, file or folder. Raises a `UsageError` if it names nothing."""
    scheme, _, rest = url.partition("://")
    try:
        urlsplit(url).port  # noqa: B018  # raises what is wrong with the address
    except ValueError as error:
        raise UsageError(f"not a usable URL: {error}", file=shown_url(url)) from error
    if scheme == "hf":
        return _on_hub(rest.rstrip("/"))
    return _on_web(url) if scheme.startswith("http") else _in_bucket(scheme, unquote(rest).rstrip("/"))


def _on_web(url: str) -> Place:
    parts = urlsplit(url)
    folder, _, name = parts.path.rpartition("/")
    single = name if name.endswith((".safetensors", ".safetensors.index.json")) else None
    folder = folder if single else parts.path.rstrip("/")
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
    names = tuple(one.rfilename for one in info.siblings or ())
    folder, single = _split(found[3] or "", (found[3] or "") in names)
    shown = f"hf://{hub_id.repo}@{info.sha}{folder and '/'}{folder}"

    def file(name: str) -> WebFile:
        address = hub.hf_hub_url(hub_id.repo, name, subfolder=folder or None, revision=info.sha)
        return WebFile(address, f"{shown}/{name}", headers)

    return Place(shown, file, _below(names, folder), single, hub_id.repo, info.sha)


def _in_bucket(scheme: str, path: str) -> Place:
    with store_errors(f"{scheme}://{path}"):
        store = open_store(scheme)
        folder, single = _split(path, store.info(path)["type"] == "file")
        names = () if single else _below(store.find(folder), folder)
    shown = f"{scheme}://{folder}"
    return Place(shown, lambda name: StoreFile(store, f"{folder}/{name}", f"{shown}/{name}"), names, single)


def _split(path: str, is_file: bool) -> tuple[str, str | None]:
    """The folder of a path, and the file in it if it is one."""
    folder, _, name = path.rpartition("/")
    return (folder, name) if is_file else (path, None)


def _below(names: Iterable[str], folder: str) -> tuple[str, ...]:
    start = f"{folder}/" if folder else ""
    return tuple(name.removeprefix(start) for name in names if name.startswith(start))
