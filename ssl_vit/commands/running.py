"""Running of a session: from start to results, in every process alike."""

from __future__ import annotations

import logging
import shlex
import signal
import time
from collections.abc import Callable
from typing import TypeVar

from ssl_vit.commands.cli import RESUMABLE, show_table
from ssl_vit.common.duration import duration
from ssl_vit.common.terminal import outliving_readers
from ssl_vit.model.execution import nothing_compiled
from ssl_vit.records.recording import by_signal, recorded
from ssl_vit.training.metrics import note_outcome
from ssl_vit.training.run_files import CONFIG_FILE
from ssl_vit.training.run_lock import locked
from ssl_vit.training.session import Session, prepare_folder, train

log = logging.getLogger("ssl_vit")
S = TypeVar("S", bound=Session)


def carry_out(
    session: S,
    about: list[tuple[str, str]],
    results: Callable[[S], dict[str, float]],
    command: str,
) -> int:
    """Training run: begin or resume, print the plan, train, print the results; the exit status.

    It is the same in every process: 0 when finished; when stopped and saved, 130 by Ctrl-C and
    ``RESUMABLE`` by another signal. The terminal may be closed meanwhile.

    Args:
        about: plan rows on what is trained.
        results: prints the results in the main process and returns the scores by name.
        command: the command; with ``--config FILE`` it resumes a stopped run.

    Raises:
        UserError: among others, another run uses the folder.
    """
    main = session.parallel.main
    with outliving_readers(), locked(session.out, main) as session.lock:
        return _carry_out(session, about, results, command)


def _carry_out(
    session: S,
    about: list[tuple[str, str]],
    results: Callable[[S], dict[str, float]],
    command: str,
) -> int:
    """Run of a session, as :func:`carry_out`, in a folder that is locked for it."""
    started = time.perf_counter()
    prepare_folder(session)
    if session.parallel.main:
        show_table(f"{session.name}: {session.out}", session.plan(about))
        for line in session.images.warnings:
            log.warning("warning: %s", line)
    with recorded(session, command) as note:
        stopped = train(session) if session.trainer.step < session.trainer.schedule.total else 0
        if stopped:
            note("stopped", by_signal(stopped))
            again = f"{command} --config {shlex.quote(str(session.out / CONFIG_FILE))}"
            step = session.trainer.step
            log.info("stopped at step %d%s; resume with: %s", step, ", saved" * bool(step), again)
            return 130 if stopped == signal.SIGINT else RESUMABLE
        session.task = session.trainer.whole()
        if session.parallel.main:
            with nothing_compiled(session.config.run.compile):
                outcome = results(session)
            session.guard()
            if note.writes:
                note_outcome(session.out, session.trainer.step, session.options(), outcome)
            note("finished")
            log.info("done in %s", duration(time.perf_counter() - started))
    session.parallel.any(False)  # processes exit together: a launcher may kill those that remain
    return 0
