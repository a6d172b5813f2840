"""From what a user names to a local path: a file, a folder, or a model of the Hugging Face Hub."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import MachineError, NeftError, UsageError

__all__ = ["Source", "is_hub_id", "resolve"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?")

#: Never fetched: weights in formats that are not read here. `apply` leaves such files behind as well.
_OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack"]
_OTHER_FOLDERS = ["original/*", "onnx/*", "openvino/*", "coreml/*"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where bytes come from.

    Attributes
    ----------
    path:
        The local file or folder.
    named:
        As the user named it.
    repo, revision:
        For a Hub model its id and the commit that was resolved; otherwise ``None``.
    """

    path: Path
    named: str
    repo: str | None = None
    revision: str | None = None

    @property
    def local_name(self) -> str:
        """The last part of the name: what a person calls it."""
        return Path(os.path.abspath(self.path)).name if self.repo is None else self.repo


def resolve(named: str | os.PathLike[str]) -> Source:
    """Find what ``named`` means. An existing local path beats a Hub id.

    A Hub id (``org/name`` or ``org/name@revision``) is fetched into huggingface_hub's cache, or
    found there.

    Raises
    ------
    UsageError
        If there is no such path, and no such repository or revision.
    MachineError
        If the Hub refuses (401, 403, gated) or cannot be reached.
    """
    text = os.fspath(named)
    path = Path(text)
    if text and _is_there(path):
        if not path.exists():
            raise UsageError("this is a link that leads nowhere", file=text)
        if not (path.is_file() or path.is_dir()):
            raise UsageError("this is a device, pipe or socket, not a file or folder", file=text)
        return Source(path, text)
    if is_hub_id(named):
        return _fetch(text)
    raise UsageError(
        "there is no such file or folder" + (", and it is not a Hub id" if text.count("/") == 1 else ""),
        file=text,
        hint="name a .safetensors file, a folder of shards with their index, or org/name of the Hub",
    )


def is_hub_id(named: str | os.PathLike[str]) -> bool:
    """Whether `resolve` would ask the Hub for ``named``."""
    path = Path(named)
    return (
        isinstance(named, str)
        and _HUB_ID.fullmatch(named) is not None
        and not _is_there(path)
        and not path.parent.is_file()
        and not (path.parent.is_dir() and named.endswith(".safetensors"))
    )


def _is_there(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def _fetch(named: str) -> Source:
    repo, _, revision = named.partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            repo, revision=revision or None, ignore_patterns=[*_OTHER_WEIGHTS, *_OTHER_FOLDERS]
        )
    except GatedRepoError as error:
        raise _refused(named, "access to it is gated", error) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"the Hub repository has no revision {revision!r}", file=repo) from error
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise _refused(named, "it is not there, or it is private", error) from error
        raise UsageError(
            "there is no such local path, and no such model on the Hub", file=named, hint="check the spelling"
        ) from error
    except LocalEntryNotFoundError as error:
        raise MachineError(
            "there is no such local path, the Hub cannot be reached, and its cache here has no such model",
            file=named,
            hint="check the network (and HF_HUB_OFFLINE), or name a local folder",
        ) from error
    except HfHubHTTPError as error:
        raise _refused(named, "the Hub refused", error) from error
    except ValueError as error:  # huggingface_hub's validation of ids and revisions
        raise UsageError(f"not a usable Hub id: {_one_line(error)}", file=named) from error
    except OSError as error:
        raise MachineError(f"fetching it from the Hub failed: {_one_line(error)}", file=named) from error
    except Exception as error:
        # A dropped connection is an error of the HTTP client, which is no OSError; which client it is
        # depends on the version of huggingface_hub. Its text may hold a signed address: not for showing.
        raise MachineError(
            f"fetching it from the Hub failed: {type(error).__name__}",
            file=named,
            hint="check the network, and run the command again: what was fetched is kept",
        ) from error
    path = Path(folder)
    return Source(path, named, repo, path.name)


def _one_line(error: Exception) -> str:
    """The first line of an error's text, without tokens and without the signatures of addresses."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.sub(r"hf_\w+|\?\S+", "…", line)


def _refused(named: str, what: str, error: Exception) -> NeftError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    ours = status is None or status < 500
    return MachineError(
        what + (f" (HTTP {status})" if status else ""),
        file=named,
        hint="log in with `hf auth login`, and accept the model's terms on its page if it has any"
        if ours
        else "that is a fault on the Hub's side: try again later",
    )
