"""The client of the Hugging Face Hub: models and single files, fetched into its cache."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import ModuleType

from .hub_errors import Redacting, hub_errors
from .hub_id import HubId

#: Forms of weights that are not read: they are not fetched, and not copied beside changed weights.
OTHER_ENDINGS = (
    ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot",
    ".tflite", ".mlmodel", ".nemo", ".npz", ".pkl", ".bin.index.json",
)  # fmt: skip
OTHER_FOLDERS = ("original", "onnx", "openvino", "coreml", "mlx")

_NOT_FETCHED = [*(f"*{ending}" for ending in OTHER_ENDINGS), *(f"{folder}/*" for folder in OTHER_FOLDERS)]


def client() -> ModuleType:
    """The package huggingface_hub, with tokens and signatures of addresses removed from its log."""
    import huggingface_hub

    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(one, Redacting) for one in handler.filters):
            handler.addFilter(Redacting())
    return huggingface_hub


def page(repo: str) -> str:
    """The address of a repository's page."""
    return f"{client().HfApi().endpoint}/{repo}"


def is_offline() -> bool:
    """Whether the user has switched the client to offline mode: it then reads its cache only."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def fetch_model(hub_id: HubId) -> Path:
    """Fetch a model into huggingface_hub's cache; returns its folder, which is named after the commit.

    A `UsageError` says that it does not exist, a `MachineError` that the Hub refuses or cannot be reached.
    """
    with hub_errors(hub_id):
        folder = client().snapshot_download(
            hub_id.repo, revision=hub_id.revision, ignore_patterns=_NOT_FETCHED
        )
    return Path(folder)


def fetch_file(hub_id: HubId, filename: str, *, again: bool = False) -> Path:
    """Fetch one file into the cache, in the folder of its commit; ``again``: even if it is there.

    Raises as `fetch_model`, and a `MismatchError` if the repository has no such file.
    """
    with hub_errors(hub_id, filename):
        path = client().hf_hub_download(hub_id.repo, filename, revision=hub_id.revision, force_download=again)
    return Path(path)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file on the Hub, not fetched: the commit it was found at, its size in bytes, and its ETag."""

    commit: str | None
    nbytes: int | None
    etag: str | None = None

    def is_content(self, content: BufferedReader) -> bool:
        """Whether an open file has the size and the hash: a SHA-256, or Git's SHA-1, if the ETag is one."""
        nbytes = content.seek(0, os.SEEK_END)
        content.seek(0)
        is_hash = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", self.etag or "")
        if self.nbytes not in (None, nbytes) or is_hash is None:
            return self.nbytes in (None, nbytes)
        git = hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)
        state = git if len(is_hash[0]) == 40 else hashlib.sha256()
        return hashlib.file_digest(content, lambda: state).hexdigest() == self.etag


def find_file(hub_id: HubId, filename: str) -> HubFile:
    """Ask the Hub for a file without fetching it. Raises as `fetch_file`."""
    with hub_errors(hub_id, filename):
        hub = client()
        found = hub.HfApi().get_hf_file_metadata(
            url=hub.hf_hub_url(hub_id.repo, filename, revision=hub_id.revision)
        )
    return HubFile(found.commit_hash, found.size, found.etag)
