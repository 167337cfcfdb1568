"""Compiled inner loops: numba's compiler, with a cache on disk that nothing depends on.

The compiled code is kept beside the module's file, or in the user's cache; the first use on a machine takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pickle import UnpicklingError
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import FunctionCache

UNREADABLE = (OSError, EOFError, ValueError, UnpicklingError)  # a full disk, or a file that was cut off on one
Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(fastmath: frozenset[str] = frozenset()) -> Callable[[Function], Function]:
    """Compile at the first call; keep the result where there is a place for it."""

    def compile_(function: Function) -> Function:
        make: Any = numba.njit
        keep: Any = _Cache
        made: Any = make(nogil=True, error_model="numpy", fastmath=set(fastmath))(function)
        with suppress(RuntimeError):  # neither this folder nor the user's can be written to
            made._cache = keep(function)  # as `enable_caching` does
        return cast(Function, made)

    return compile_


class _Cache(FunctionCache):
    """numba's cache on disk, without which work goes on: its disk may be full, or a file in it cut off."""

    def load_overload(self, sig: object, target_context: object) -> Any:
        numba_s: Any = super()
        with suppress(*UNREADABLE):
            return numba_s.load_overload(sig, target_context)
        return None

    def save_overload(self, sig: object, data: object) -> None:
        numba_s: Any = super()
        with suppress(*UNREADABLE):  # the index is read first
            numba_s.save_overload(sig, data)
