"""Own process: one side of a comparison in a separate process, with default settings."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from ssl_vit.common.errors import RunFailed, UserError


class OwnProcess:
    """Own process: the object that ``build(*arguments)`` makes, in a new process.

    ``ask`` calls a method of the object there. Ours changes how the C library keeps memory, which
    holds for a whole process: a peer in the same process would be faster, by half, than its users
    see it. Peak memory, too, is known only of a whole process. The new process has as many threads
    as this one. While one side works the others wait. Leaving the context ends the process; it may
    have child processes, such as loader workers.

    Raises:
        UserError, RunFailed: raised there by ``build`` or a method; RunFailed also when the process
            ended.
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
        """Result of calling the method ``name`` of the object."""
        try:
            self.pipe.send((name, arguments))
        except OSError:
            raise RunFailed("the side's process has ended") from None
        return self._answer()

    def end(self) -> None:
        """End of the process; it is killed if it does not exit within seconds."""
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
    """Server loop: reply (None, value) to each request, or (error name, error text) and end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and closes the pipe
    torch.set_num_threads(settings[0])
    # Otherwise loader workers would be spawned too, and import every library again.
    multiprocessing.set_start_method(settings[1], force=True)
    try:
        made = build(*arguments)
        pipe.send((None, None))
        while request := _next(pipe):
            name, given = request
            pipe.send((None, getattr(made, name)(*given)))
    except Exception as error:
        with suppress(OSError):  # the parent is gone
            pipe.send((type(error).__name__, str(error) or type(error).__name__))


def _next(pipe: Connection) -> tuple[str, tuple[Any, ...]] | None:
    """Next request; None when the parent is gone."""
    try:
        request: tuple[str, tuple[Any, ...]] = pipe.recv()
    except (EOFError, OSError):
        return None
    return request
