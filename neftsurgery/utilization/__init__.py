"""The paper's analysis of a fine-tune: how each neuron's alignment with hidden states moved in the ranking.

The package has the name of its verb, ``ns.utilization``, and Python binds a package to its name whenever a
module of it is first imported. So the package can be called, and it does not matter which came first.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """As `neftsurgery.utilization.measure.utilization`."""
        from .measure import utilization

        return utilization(*args, **options)


sys.modules[__name__].__class__ = _Verb
