"""Data workers: processes that prepare batches; one that fails or dies ends the run in one line.

Batches reach the main process through shared memory, files in /dev/shm. torch's loader makes these
files in a thread of the worker whose errors reach nobody: where there is no room the batch never
arrives, and the main process waits for ever. Here the worker makes them itself.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.common.waiting import local_processes
from ssl_vit.data.packing import Packed, packed
from ssl_vit.data.shared_memory import (
    SHARED_MEMORY,
    affordable,
    pinnable,
    pinned_bytes,
    remedy,
    room_now,
)

# Signs of a lack of memory or of file descriptors, in messages of torch and of Python.
_MEMORY = ("can't allocate memory", "Cannot allocate memory", "MemoryError")
_DESCRIPTORS = ("Too many open files", "items of ancdata")
_DYING = 2.0  # seconds from a lost connection to the end of the worker


def load(
    images: Dataset[Any],
    batches: Iterable[list[Any]],
    workers: int,
    pin: bool,
    prefetch: int = 2,
    held: int = 2,
    collate: Callable[[Any], Any] | None = None,
    claim: Callable[[float], None] | None = None,
) -> Iterator[Any]:
    """Batches of these indices, in order; the workers start now, and end with the last batch.

    The first batch raises ``RunFailed`` if shared memory has no room; any, if a worker dies.

    Args:
        images: a dataset whose ``__getitems__`` returns a whole batch, with ``nbytes``; or, with
            ``collate``, one of single images.
        batches: the indices of each batch.
        workers: 0: this process prepares them itself.
        prefetch: batches that each worker prepares ahead; fewer if shared memory is too small.
        held: batches that the caller holds at a time, with the next.
        collate: makes a batch of what ``images`` returns.
        claim: called, before the workers start, with the bytes of shared memory that the batches of
            all processes on this machine may take.
    """
    options: dict[str, Any] = {"batch_sampler": batches, "pin_memory": pin}
    collate = collate or _as_is
    if not workers:
        return iter(DataLoader(images, collate_fn=collate, **options))
    try:
        size, copied = _batch_bytes(images, batches)
        prefetch = pinnable(copied, workers, prefetch) if pin else prefetch
        ahead = affordable(size, workers, prefetch, held)
        if claim:
            claim(float(local_processes(os.environ) * (workers * ahead + held) * size))
        loader = DataLoader(
            images,
            collate_fn=partial(packed, collate),
            num_workers=workers,
            worker_init_fn=_quiet,
            prefetch_factor=ahead,
            **options,
        )
        return _delivered(*_started(loader))
    except RunFailed as error:
        return _failing(error)


# --- in a worker --------------------------------------------------------------------------------


def _as_is(batch: Any) -> Any:
    return batch


def _quiet(worker: int) -> None:
    """Workers leave stopping to the main process (Slurm, Ctrl-C and a closed terminal signal
    every process)."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    for name in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        signal.signal(name, signal.SIG_DFL)  # without torch's line: the main process says why
    torch.set_num_threads(1)


# --- in the main process ------------------------------------------------------------------------


def _batch_bytes(images: Dataset[Any], batches: Iterable[list[Any]]) -> tuple[int, int]:
    """Bytes of the first batch, and of its copy in pinned memory, from one of its images; 0:
    unknown."""
    first = next(iter(batches), [])
    whole = getattr(images, "__getitems__", None)
    if not first or whole is None:
        return 0, 0
    try:
        one, n = whole(first[:1]), len(first)
    except UserError:  # unreadable images, which the worker will report
        return 0, 0
    sizes = [tensor.nbytes * n for tensor in one.views.tensors()] if hasattr(one, "views") else []
    return one.nbytes * n, pinned_bytes(sizes or [one.nbytes * n])


def _started(loader: DataLoader[Any]) -> tuple[Iterator[Any], list[BaseProcess]]:
    """The batches of a loader, and its workers, which start now and end with this process.

    torch's reaction to the death of a worker, an exception anywhere in the main thread, is left
    out: it could break a checkpoint. The wait for a batch finds the death within 5 seconds.

    Raises:
        RunFailed: they cannot be started.
    """
    others, main = multiprocessing.active_children(), _in_main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        multiprocessing.Semaphore()  # a file in shared memory, as the loader makes many
        batches = iter(loader)
    except OSError as error:
        end([c for c in multiprocessing.active_children() if c not in others])
        raise RunFailed(_cause(error, []) or _not_started(error)) from None
    if main and before is not None:
        signal.signal(signal.SIGCHLD, before)
    atexit.unregister(_end_all)  # it must come before what the loader itself registers
    atexit.register(_end_all)
    return batches, [c for c in multiprocessing.active_children() if c not in others]


def _delivered(batches: Iterator[Any], workers: list[BaseProcess]) -> Iterator[Any]:
    """The batches; the workers are ended with the last one, and by an error or interruption.

    Raises:
        UserError, RunFailed: raised by a worker, without the traceback that comes from there.
        RunFailed: a worker died, or this process cannot receive its batches.
    """
    try:
        for batch in batches:
            yield batch.open() if isinstance(batch, Packed) else batch
    except (UserError, RunFailed) as error:  # torch gives its message with the worker's traceback
        kind = UserError if isinstance(error, UserError) else RunFailed
        raise kind(str(error).rpartition(f"{kind.__name__}: ")[2].strip()) from None
    except (RuntimeError, OSError, MemoryError, EOFError) as error:
        if reason := _cause(error, workers):
            raise RunFailed(reason) from None
        raise
    finally:
        if any(worker.exitcode is None for worker in workers):  # else Python may be ending
            end(workers)


def _failing(error: RunFailed) -> Iterator[Any]:
    """No batches, but an error for who asks for the first."""
    raise error
    yield


def _cause(error: BaseException, workers: list[BaseProcess]) -> str:
    """Reason of a failure, if it is a dead worker or a lack of something; else empty."""
    if workers and isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
        ending = wait([worker.sentinel for worker in workers], _DYING)
        for worker in (w for w in workers if w.sentinel in ending):
            worker.join(_DYING)
    for worker in workers:
        if worker.exitcode is not None:
            return _of_death(worker.pid or 0, worker.exitcode, len(workers))
    text = f"{type(error).__name__}: {error}"
    if any(sign in text for sign in _DESCRIPTORS):
        return (
            "too many open files: each batch of a data worker takes some. Raise the limit "
            "(ulimit -n 4096), or give fewer --data.workers"
        )
    if "shared memory" in text:
        reason = text.strip().rpartition(": ")[2]
        return f"a batch does not fit into {SHARED_MEMORY} ({room_now()}): {reason}. {remedy()}"
    if any(sign in text for sign in _MEMORY):
        return f"a data worker lacks memory. {_less_memory(len(workers))}"
    return ""


def _not_started(error: OSError) -> str:
    """Reason why workers cannot start: mostly shared memory, which may be read-only."""
    return (
        f"data workers cannot be started: {error.strerror} ({SHARED_MEMORY}: {room_now()}). "
        f"{remedy()}"
    )


def _of_death(pid: int, status: int, workers: int) -> str:
    """Likely cause of a worker's end with this exit status, and the remedy."""
    if status >= 0:
        return f"a data worker (process {pid}) ended by itself with status {status}"
    name = signal.Signals(-status).name
    died = f"a data worker (process {pid}) was killed by {name}"
    if -status == signal.SIGKILL:
        return (
            f"{died}, most likely for want of memory (of the machine, the container or the job). "
            f"{_less_memory(workers)}"
        )
    if -status == signal.SIGBUS:
        return f"{died}, most likely as {SHARED_MEMORY} is full ({room_now()}). {remedy()}"
    return (
        f"{died}, most likely in a library that decodes images; --data.workers 0 shows where, "
        "with python -X faulthandler"
    )


def _less_memory(workers: int) -> str:
    return f"Give fewer --data.workers (there were {workers}), or more memory"


def end(workers: list[BaseProcess]) -> None:
    """Kill these workers, if they are this process': they hold nothing, and ignore SIGTERM."""
    mine = [c for c in multiprocessing.active_children() if c in workers]
    main = _in_main_thread()
    # A handler of torch's, of another loader, would raise an error for each.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    for worker in mine:
        worker.kill()
    for worker in mine:
        worker.join(1)
    if before is not None:
        signal.signal(signal.SIGCHLD, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end_all() -> None:
    """End all workers first: Python would send SIGTERM and wait, after an error for ever."""
    end([c for c in multiprocessing.active_children() if c.daemon])
