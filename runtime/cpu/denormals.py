"""Denormal numbers, those nearest to zero, as zero while a graph runs: some processors are many times slower with them.

The softmax of the generator's self-attention yields them. The setting is a thread's own, and what else runs in that
thread (numpy, numba) must not notice.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import sys
from collections.abc import Iterator
from typing import Any

_WORDS = 8  # of 32 bits in the fenv_t of x86-64 Linux, the last of which is the register MXCSR
_AS_ZERO = 0x8040  # its bits for results (flush to zero) and for operands (denormals are zero)


@contextlib.contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Take denormal numbers as zero in this thread, on x86-64 Linux; elsewhere this does nothing."""
    library = _library()
    if library is None:
        yield
        return
    before = (ctypes.c_uint32 * _WORDS)()
    library.fegetenv(before)
    within = (ctypes.c_uint32 * _WORDS)(*before)
    within[-1] |= _AS_ZERO
    library.fesetenv(within)
    try:
        yield
    finally:
        library.fesetenv(before)


@functools.cache
def _library() -> Any:
    """The C library's functions for a thread's floating-point settings; None where they are not those known here."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    try:
        return ctypes.CDLL("libm.so.6")
    except OSError:  # not glibc
        return None
