"""Printing where nobody reads any more: a closed pipe and a closed terminal."""

import errno
import io
import os
import pty
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from ssl_vit.common.terminal import outliving_readers


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    theirs, ours = pty.openpty()
    os.close(theirs)
    return ours


@pytest.mark.parametrize("closed", [closed_pipe, closed_terminal])
def test_printing_goes_on_when_the_reader_has_gone(monkeypatch, closed: Callable[[], int]):
    """Buffered or not, by print or by rich; also what is only written at the end."""
    for buffering, flush in ((1, False), (-1, True), (-1, False)):
        with open(closed(), "w", buffering=buffering) as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            monkeypatch.setattr(sys, "stdout", stream)
            with outliving_readers():
                print("one", file=sys.stderr, flush=flush)
                Console(file=sys.stderr).print("[b]two[/b]")
                print("three")
            assert sys.stdout is stream
            print("four", flush=True)  # it writes to the null device now


def test_what_can_be_read_arrives(capsys):
    with outliving_readers():
        print("one")
        print("two", file=sys.stderr)
        assert not sys.stdout.isatty()
    assert capsys.readouterr() == ("one\n", "two\n")


def test_other_errors_come_out(monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="No space left"), outliving_readers():
        print("one")
