"""The memory allocator of the process; without torch, as it is set before torch is imported."""

import ctypes
import sys

# <malloc.h> of glibc
M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = 1, -1, -3


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that it frees, for the next tensors; returns whether it did.

    By default glibc gives every block above 32 MiB back to the system as soon as it is freed, and
    the next tensor of that size takes page faults again, which on CPUs is up to half of the time of
    an evaluation. From this call on blocks below 1 GiB are kept. It holds for the whole process and
    cannot be undone, so the library never calls it; both commands do, and a notebook may, before
    its first tensor. Where the C library is not glibc, or refuses, nothing changes and the result
    is False.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # The first is refused by versions of glibc that map every block above 32 MiB. Without the last,
    # remainders of aligned blocks (glibc before 2.38) stay between free blocks and keep them apart.
    settings = {M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: 2**31 - 1, M_MXFAST: 0}
    return all(libc.mallopt(name, value) == 1 for name, value in settings.items())
