"""A process's memory: how much is free, and how what it holds stays near what it needs.

This module knows nothing of models. How much is free can be told on Linux alone; what else is asked
of Linux and glibc is left undone on other systems.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_MADV_DONTNEED = 4  # sys/mman.h
_MAPS = Path("/proc/self/maps")
_MEMINFO = Path("/proc/meminfo")


def available_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on the node (Linux's MemAvailable) or a GPU.

    Raises:
        OSError: the system does not say how much is free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    for line in _MEMINFO.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return 1024 * int(value.split()[0])
    raise OSError(f"{_MEMINFO} has no MemAvailable")


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Have glibc give large blocks back as soon as they are freed, inside the `with` block.

    Left to itself it raises the size from which it maps memory directly up to 32 MiB, and what is
    read while loading then leaves some 60 MB of holes in its heap. Serving steps wants the
    opposite: activations that are freed and allocated again should stay mapped.
    """
    _mallopt(_M_MMAP_THRESHOLD, 128 << 10)
    try:
        yield
    finally:
        _mallopt(_M_MMAP_THRESHOLD, 32 << 20)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for as long as the process lives.

    This is for programs that compute the same large tensors again and again, distributions over a
    vocabulary above all: to map and clear 100 MB anew takes longer than to compute them.
    """
    _mallopt(_M_MMAP_MAX, 0)
    _mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def release_import_time_code() -> None:
    """Unmap the pages of libraries' code; those that are used again come back from the page cache.

    Importing torch and Ray runs through some 75 MB of code, most of it once. Code pages are never
    written, so dropping them loses nothing; data, relocated tables among it, is left alone.
    """
    if not _MAPS.exists():
        return
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in _MAPS.read_text(encoding="utf-8").splitlines():
        addresses, permissions, _offset, _device, inode, *_path = line.split()
        if permissions == "r-xp" and inode != "0":
            first, last = (int(address, 16) for address in addresses.split("-"))
            if madvise(first, last - first, _MADV_DONTNEED):
                logger.debug("madvise refused %s: errno %d", line, ctypes.get_errno())


def _mallopt(parameter: int, value: int) -> None:
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(parameter, value)
