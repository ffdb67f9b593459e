"""Errors that are one clear line: a user's mistake, and a run that cannot go on."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """User error, in one line: what was given, what is allowed, where it came from.

    ``everywhere``: raised by every process, so that only one needs to report it.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class NothingFound(UserError):  # noqa: N818
    """User error: nothing of what these options of the data ask for is in a source, as labels in a
    CSV. One of several sources may do without."""

    def __init__(self, message: str, *options: str) -> None:
        super().__init__(message)
        self.options = options


class RunFailed(RuntimeError):  # noqa: N818
    """Run failure: a run cannot continue, not by a user error; its last checkpoint is complete.

    ``everywhere``: as for :class:`UserError`.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def check(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def naming_option(option: str, given: str) -> Iterator[None]:
    """Name the option that ``given`` came from in errors raised inside, unless they do already."""
    try:
        yield
    except UserError as error:
        text = str(error)
        named = text if text.startswith(option) else f"{option} {given}: {text}"
        raise UserError(named, error.everywhere) from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Hint for an unknown ``name``: `` (nearest known: x, y)``; an empty string if none is near, or
    it is known: most are, and a comparison with each of a thousand takes its time."""
    names = list(known)
    close = [] if name in names else difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" (nearest known: {', '.join(close)})" if close else ""
