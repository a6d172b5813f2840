"""The config of the PEFT method: which neurons, by a file or by a budget."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from peft import PeftConfig
from peft.utils import PeftType

from ..errors import MismatchError

_VERSION = 1
DatalessPolicy: TypeAlias = Literal["random", "norm", "magnitude"]

_NOTE = """
## How to load it

This adapter trains whole neurons, with the PEFT method of `neftsurgery`.
Import the method once, then use PEFT as always:

```python
import neftsurgery.peft
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{folder}")
```
"""


def _enum_entry(name: str) -> PeftType:
    """The entry of PEFT's enum of methods, added if it is not there: PEFT has no public way to add one."""
    if name not in PeftType.__members__:
        entry = str.__new__(PeftType, name)
        entry._name_ = entry._value_ = name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = entry
        type.__setattr__(PeftType, name, entry)
    return PeftType(name)


NEFT = _enum_entry("NEFT")


@dataclass
class NeftConfig(PeftConfig):
    """Train chosen neurons of a frozen model.

    The neurons are those of a selection or patch file, or as many as a budget says, by a policy that needs no
    data. A saved adapter needs no file besides its own two: it holds the neurons' numbers and vectors.

    Args:
        selection: The path of a selection or patch. A patch also gives the first values.
        neurons, params: The budget, without a file: so many neurons, or neurons with so many parameters;
            ``"3%"``, ``50000``.
        policy: Which come first: ``random``; ``norm``: those with the largest vectors; ``magnitude``: those
            with the largest mean absolute weight.
        seed: Of the policy ``random``.
        anatomy: ``rows``, ``ffn`` or ``units``: what a neuron is.
        target_modules, exclude_modules: Names of modules as elsewhere in PEFT: the only ones that are
            considered, or those that are not.
        include: Globs of tensors that are left out otherwise, such as the embedding.
        modules_to_save: Modules that are trained and saved whole, such as a new head.
        counts: Set by the method: how many neurons of each parameter the adapter holds, and along which axes.
        base_fingerprint, version: Set by the method: that of the files of a quantized base, and that of the
            adapter's form.
    """

    selection: str | None = None
    neurons: str | int | None = None
    params: str | int | None = None
    policy: DatalessPolicy = "random"
    seed: int = 0
    anatomy: str = "rows"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    include: list[str] = field(default_factory=list)
    modules_to_save: list[str] | None = None
    counts: dict[str, list[int]] = field(default_factory=dict)
    base_fingerprint: str | None = None
    version: int = _VERSION

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = NEFT
        if self.version > _VERSION:
            what = f"the adapter was saved by a newer version of neftsurgery, as version {self.version}"
            raise MismatchError(what, hint="update neftsurgery")

    def to_dict(self) -> dict[str, Any]:
        """What is saved: no path of this machine."""
        return {**super().to_dict(), "selection": None}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As PEFT's; the folder's README says what to import."""
        super().save_pretrained(str(save_directory), **kwargs)
        page = Path(save_directory) / "README.md"
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        if "import neftsurgery.peft" not in text:
            page.write_text(text + _NOTE.format(folder=Path(save_directory).name), encoding="utf-8")

    def layouts(self) -> Mapping[str, tuple[int, tuple[int, ...]]]:
        """For each parameter, how many neurons, and their axes."""
        return {name: (count, tuple(axes)) for name, (count, *axes) in self.counts.items()}
