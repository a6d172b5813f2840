"""Where a checkpoint came from, as scores, selections and patches record it."""

from __future__ import annotations

from typing import Self

from ..tensors.document import Facts
from .fingerprint import fingerprint
from .side import Side

__all__ = ["Provenance"]


class Provenance(Facts):
    """The ``base`` or ``tuned`` of a file: what is known of the checkpoint it was made from."""

    @classmethod
    def of(cls, checkpoint: Side) -> Self:
        """Of a checkpoint that is at hand; reads the edges of its tensors."""
        source = checkpoint.source
        hub = {} if source.repo is None else {"repo": source.repo, "revision": source.revision}
        return cls({"name": source.local_name, **hub, "fingerprint": fingerprint(checkpoint)})

    @property
    def name(self) -> str | None:
        """The name of its file or folder."""
        return self.text("name")

    @property
    def repo(self) -> str | None:
        """``org/name`` on the Hub."""
        return self.text("repo")

    @property
    def revision(self) -> str | None:
        """The revision of ``repo``."""
        return self.text("revision")

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of its tensors."""
        return self.text("fingerprint")

    @property
    def label(self) -> str | None:
        """What to call it in a sentence: the repository, or else the name."""
        return self.repo or self.name or None
