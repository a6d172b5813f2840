"""Values that live in a safetensors file: scores and patches."""

from __future__ import annotations

import hashlib
import os
from io import BufferedReader
from pathlib import Path
from typing import Self

from ..errors import boundary
from ..progress import Timing
from ..storage.output import staged_file
from ..storage.output_checks import refuse_output, require_space
from .reader import TensorFile

__all__ = ["FileBacked"]


class FileBacked:
    """A value whose content stays in its file, which it holds open; saved by copying that file."""

    #: What making it took, where a verb made it.
    timing: Timing = Timing()

    def __init__(self, file: TensorFile) -> None:
        self._file = file

    @property
    def path(self) -> Path | None:
        """The file; None for a value that was never saved, which ends with its last reference."""
        return self._file.path

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._file.nbytes

    def check_unchanged(self) -> None:
        """Raise a `MachineError` if the file was edited since it was opened."""
        self._file.check_unchanged()

    @boundary
    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Copy it to the file ``path``, whole or not at all.

        Raises
        ------
        UsageError
            If ``path`` exists, without ``force``.
        MachineError
            If it cannot be written.
        """
        refuse_output(path, inputs=[], force=force, kind="file")
        with staged_file(path, force=force) as staged:
            require_space(Path(path).absolute().parent, self.nbytes)
            self._file.copy_to(staged.fd)
            self.check_unchanged()

    def stream(self) -> BufferedReader:
        """The file's bytes from the start, as a file that the caller closes; open one at a time."""
        return self._file.stream()

    def sha256(self) -> str:
        """The SHA-256 of the whole file, in hex, as ``sha256sum`` and the Hub show it; reads all of it."""
        with self.stream() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def check_in_place(self) -> None:
        """Raise a ``FileNotFoundError`` if its file was removed or replaced since it was opened."""
        self._file.check_in_place()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
