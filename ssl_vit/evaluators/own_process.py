"""A peer in a process of its own: it is measured as it comes, without what ours sets for itself."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from ssl_vit.config import RunFailed, UserError

Step = Callable[[], Any]


class OwnProcess:
    """Calls ``build(*arguments)`` in a new process, and there, at each call, what it returned.

    How the C library keeps memory, which ours sets, belongs to the whole process: a peer in ours
    would be faster, by half, than its users see it. The new process has as many threads as this.

    ``build`` is a function of a module; it returns a step, which returns a number, and facts about
    it. While one side works the other waits. The process ends with this one.

    Raises:
        UserError, RunFailed: what ``build`` or the step raised there; RunFailed also where the
            process ended.
    """

    def __init__(self, build: Callable[..., tuple[Step, Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        work = (theirs, torch.get_num_threads(), build, arguments)
        self.process = context.Process(target=_serve, args=work, daemon=True)
        self.process.start()
        theirs.close()
        self.facts = self._answer()

    def __call__(self) -> float:
        return self._answer(ask=True)

    def _answer(self, ask: bool = False) -> Any:
        try:
            if ask:
                self.pipe.send(None)
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            raise RunFailed("the peer's process has ended") from None
        if kind is None:
            return value
        raise (UserError if kind == "UserError" else RunFailed)(value)


def _serve(
    pipe: Connection, threads: int, build: Callable[..., tuple[Step, Any]], arguments: Any
) -> None:
    """Answer (None, value) to each request, or (the error's name, its text) and end."""
    torch.set_num_threads(threads)
    try:
        step, facts = build(*arguments)
        pipe.send((None, facts))
        while True:
            pipe.recv()
            pipe.send((None, float(step())))
    except EOFError:
        return
    except Exception as error:
        pipe.send((type(error).__name__, str(error)))
