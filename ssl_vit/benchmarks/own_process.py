"""A side of a comparison in a process of its own, as it comes and with memory of its own."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from ssl_vit.common.config import RunFailed, UserError


class OwnProcess:
    """What ``build(*arguments)`` makes, in a new process; ``ask`` calls a method of it there.

    How the C library keeps memory, which ours sets, belongs to the whole process: a peer in ours
    would be faster, by half, than its users see it. And the most memory that a process held is told
    of a whole process. The new one has as many threads as this. While one side works the others
    wait. Leaving the context ends it; it may have processes of its own, as loaders do.

    Raises:
        UserError, RunFailed: what ``build`` or a method raised there; RunFailed also where the
            process ended.
    """

    def __init__(self, build: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        settings = torch.get_num_threads(), multiprocessing.get_start_method()
        work = (theirs, settings, build, arguments)
        self.process = context.Process(target=_serve, args=work)
        self.process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> OwnProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def ask(self, name: str, *arguments: Any) -> Any:
        """The value of the method ``name`` of what was built."""
        try:
            self.pipe.send((name, arguments))
        except OSError:
            raise RunFailed("the side's process has ended") from None
        return self._answer()

    def end(self) -> None:
        """Let it leave; one that does not is killed."""
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _answer(self) -> Any:
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            raise RunFailed("the side's process has ended") from None
        if kind is None:
            return value
        raise (UserError if kind == "UserError" else RunFailed)(value)


def _serve(
    pipe: Connection, settings: tuple[int, str], build: Callable[..., Any], arguments: Any
) -> None:
    """Answer (None, value) to each request, or (the error's name, its text) and end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end is interrupted, and then gone
    torch.set_num_threads(settings[0])
    # Else the workers of loaders here would be started as this process was, one library at a time.
    multiprocessing.set_start_method(settings[1], force=True)
    try:
        made = build(*arguments)
        pipe.send((None, None))
        while request := _next(pipe):
            name, given = request
            pipe.send((None, getattr(made, name)(*given)))
    except Exception as error:
        with suppress(OSError):  # the other end is gone
            pipe.send((type(error).__name__, str(error) or type(error).__name__))


def _next(pipe: Connection) -> tuple[str, tuple[Any, ...]] | None:
    """The next request; None where the other end is gone."""
    try:
        request: tuple[str, tuple[Any, ...]] = pipe.recv()
    except (EOFError, OSError):
        return None
    return request
