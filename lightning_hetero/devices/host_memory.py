"""Makes the host's allocator keep what it has, for processes in which the CPU plays other devices."""

from __future__ import annotations

import ctypes
import functools
import logging

log = logging.getLogger(__name__)

# Names and numbers of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more
_LARGEST_INT = 2**31 - 1


@functools.cache
def keep_host_memory() -> bool:
    """Tell the C library not to return freed memory to the system, from now on and for the whole process.

    Accelerators cache their memory. The CPU's allocator does not: it returns the activations of a step and gets them
    anew in the next one, page by page, which takes as long as computing them, and more or less long from run to run.
    A device that the CPU plays would be slow and unsteady by that, and its sleeps would multiply it. Numbers do not
    change; the process holds on to the most that it ever needed.

    Returns:
        Whether it was done: only glibc can. The first call does it, later ones say the same.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        log.debug("this C library has no mallopt, so emulated devices are less steady")
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    # Other threads than the first get arenas of their own, which are given back as soon as they are empty. From now on
    # there is one for all threads to come.
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        and mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
        and mallopt(_M_ARENA_MAX, 1)
    )
