"""Pictures: where a fine-tune changed a model, which neurons a budget chooses, and how sure that is.

The package has the name of its verb, ``ns.report``, and Python binds a package to its name whenever a
module of it is first imported. So the package can be called, and it does not matter which came first.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """As `neftsurgery.report.report.report`."""
        from .report import report

        return report(*args, **options)


sys.modules[__name__].__class__ = _Verb
