"""Shared memory, in which data workers hand over their batches: its size, and what fits into it.

In a container it often has 64 MiB (Docker's default), on a machine half of the memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from ssl_vit.common.errors import RunFailed
from ssl_vit.common.free_memory import memory_here
from ssl_vit.common.waiting import local_processes

log = logging.getLogger("ssl_vit")
SHARED_MEMORY = "/dev/shm"
# Pinned batches take at most one part in so many of the machine's memory.
_PINNED = 8


def affordable(batch: int, workers: int, prefetch: int, held: int = 2) -> int:
    """Batches that each worker can prepare ahead: at most ``prefetch``, at least one.

    Args:
        batch: bytes of a batch; 0: unknown.
        held: batches that the main process holds: those in use, and the next.

    Raises:
        RunFailed: shared memory is too small for one of each worker.
    """
    try:
        free, total = room()
    except OSError:  # a system without it, or a failure that the workers will report
        return prefetch
    if not (batch and total):
        return prefetch
    processes = local_processes(os.environ)
    fits = (free // processes // batch - held) // workers
    if fits >= prefetch:
        return prefetch
    size = shm_size(processes * (workers * prefetch + held) * batch)
    if (workers + held - 1) * batch > free:
        raise RunFailed(
            f"{SHARED_MEMORY} is too small for a batch of {mebibytes(batch)} from each of "
            f"{workers} data workers: {room_text(free, total)}. {remedy(size)}"
        )
    ahead = max(1, fits)
    log.warning(
        "%s holds few batches of %s (%s): each of %d data workers prepares %d ahead, not %d; "
        "docker run --shm-size=%s (or --ipc=host) would give them room",
        *(SHARED_MEMORY, mebibytes(batch), room_text(free, total), workers, ahead, prefetch, size),
    )
    return ahead


def pinned_bytes(sizes: Iterable[int]) -> int:
    """Bytes of pinned memory that copies of tensors of so many bytes take: torch rounds each up to
    a power of two."""
    return sum(1 << (size - 1).bit_length() for size in sizes if size)


def pinnable(batch: int, workers: int, prefetch: int, memory: int | None = None) -> int:
    """Batches that each worker can prepare ahead where each is copied to pinned memory, which is
    never paged out: at most ``prefetch``, at least one, so that the copies of all processes take
    an eighth of the machine's memory, or of what a container or a scheduler leaves of it.

    Args:
        batch: bytes of the copy of a batch (:func:`pinned_bytes`); 0: unknown.
        memory: in bytes; None: what the machine says.
    """
    if not batch or not workers:
        return prefetch
    own = (memory or memory_here()) // _PINNED // local_processes(os.environ)
    ahead = max(1, min(prefetch, own // (workers * batch)))
    if ahead < prefetch:
        log.info(
            "each of %d data workers prepares %d batches ahead, not %d: %s of pinned memory",
            *(workers, ahead, prefetch, mebibytes(ahead * workers * batch)),
        )
    return ahead


def room() -> tuple[int, int]:
    """Free and total bytes of shared memory.

    Raises:
        OSError: there is none.
    """
    disk = os.statvfs(SHARED_MEMORY)
    return disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize


def shm_size(need: int) -> str:
    """Docker's ``--shm-size`` for so many bytes: a power of two, with room for others."""
    size = 1 << max(10, (2 * need >> 20).bit_length())
    return f"{size >> 10}g"


def mebibytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:,.1f} MiB" if count < 10 << 20 else f"{count / 2**20:,.0f} MiB"


def room_text(free: int, total: int) -> str:
    """Free and total bytes for people."""
    return f"{mebibytes(free)} free of {mebibytes(total)}"


def room_now() -> str:
    """Shared memory that is free now, as :func:`room` finds it, for people."""
    try:
        return room_text(*room())
    except OSError as error:
        return str(error.strerror)


def remedy(size: str = "2g") -> str:
    """Remedy where shared memory is too small."""
    return (
        f"Start the container with docker run --shm-size={size} (or --ipc=host), free what others "
        "hold there, or give --data.workers 0"
    )
