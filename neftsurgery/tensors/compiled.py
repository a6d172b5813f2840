"""Kernels: functions that numba compiles, that release the GIL, and that are kept on disk once compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that compiles a function, with the ``options`` of `numba.njit`."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # no cache folder is writable: compile again in each process
            return numba.njit(nogil=True, **options)(function)  # type: ignore[no-any-return]

    return wrap
