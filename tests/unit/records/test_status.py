"""What a run says of itself: written whole, read back, and recorded at every end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.common.processes import process_start
from ssl_vit.records import recording
from ssl_vit.records.recording import by_signal, recorded
from ssl_vit.records.status import STATUS_FILE, Status, read_status, write_status


def session(folder: Path, step: int = 0, main: bool = True) -> SimpleNamespace:
    """As much of a run as its status tells."""
    return SimpleNamespace(
        name="mae",
        out=folder,
        guard=lambda: None,
        task=SimpleNamespace(pooling="mean"),
        order=SimpleNamespace(batch_size=120, steps_per_epoch=11),
        parallel=SimpleNamespace(main=main, world=2, device=torch.device("cpu")),
        trainer=SimpleNamespace(step=step, schedule=SimpleNamespace(total=24)),
    )


def fail(run: SimpleNamespace, error: BaseException, at: int = 0) -> None:
    """End a run by an error at a step; it must come out as it is."""

    def train() -> None:
        run.trainer.step = at
        raise error

    with pytest.raises(type(error)) as raised, recorded(run, "door"):
        train()
    assert raised.value is error


def test_what_is_written_is_read_back(tmp_path):
    status = Status("failed", "dino", process_started=None, versions={"a": "1"}, reason="é\n")
    write_status(tmp_path, status)
    assert read_status(tmp_path) == status
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_FILE]


def test_absent(tmp_path):
    assert read_status(tmp_path) is None
    assert read_status(tmp_path / "nowhere") is None


def test_unknown_keys_are_passed_over_and_missing_ones_have_defaults(tmp_path):
    (tmp_path / STATUS_FILE).write_text('{"state": "running", "later": [1], "step": 3}')
    assert read_status(tmp_path) == Status("running", step=3)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe\x00",
        b'{"state": "well"}',
        b'{"state": ["running"]}',
        b'{"state": "running", "step": "3"}',
        b'{"state": "running", "pid": true}',
        b'{"state": "running", "process_started": 1.5}',
        b'{"state": "running", "versions": []}',
        b"[" * 100_000,
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / STATUS_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"status\.json is damaged: ") as told:
        read_status(tmp_path)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 300


def test_a_run_from_its_first_step_to_its_last(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run, before = session(tmp_path), time.time()
    with recorded(run, "python -m ssl_vit.pretrain mae") as note:
        first = read_status(tmp_path)
        run.trainer.step = 24
        note("finished")
    last = read_status(tmp_path)
    assert (first.state, first.step, first.total) == ("running", 0, 24)
    assert before <= first.started <= first.updated <= time.time()
    assert (first.pid, first.process_started) == (os.getpid(), process_start(os.getpid()))
    assert (first.job, first.processes, first.device) == ("77", 2, "cpu")
    assert (first.images_per_step, first.steps_per_epoch, first.pooling) == (120, 11, "mean")
    assert first.versions["torch"] == torch.__version__
    assert {*first.versions} == {"torch", "timm", "ssl_vit"}
    assert (last.state, last.step, last.started) == ("finished", 24, first.started)
    assert last.updated > first.updated


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("the images have changed\nsecond"), "the images have changed"),
        (RunFailed("not finite 10 steps in a row"), "not finite 10 steps in a row"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("gloo: Connection closed by peer"), "another process has exited"),
    ],
)
def test_a_failure_is_noted_and_goes_on(tmp_path, error, reason):
    run = session(tmp_path)
    fail(run, error, at=7)
    found = read_status(tmp_path)
    assert (found.state, found.step) == ("failed", 7)
    assert found.reason.startswith(reason)
    assert "second" not in found.reason


def test_an_interrupt_is_no_failure(tmp_path):
    fail(session(tmp_path), KeyboardInterrupt())
    assert read_status(tmp_path).state == "stopped"


def test_a_full_disk_hides_no_failure_and_stops_no_run(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "write_status", full)
    with pytest.raises(RunFailed, match="the first"), recorded(session(tmp_path), "door"):
        raise RunFailed("the first")
    with recorded(session(tmp_path), "door") as note:
        note("finished")
    assert "No space left" in caplog.text
    assert read_status(tmp_path) is None


def test_other_processes_say_nothing(tmp_path):
    fail(session(tmp_path, main=False), RunFailed("x"))
    with recorded(session(tmp_path, main=False), "door") as note:
        note("finished")
    assert list(tmp_path.iterdir()) == []


def test_going_on_keeps_when_it_began_and_beginning_anew_does_not(tmp_path):
    write_status(tmp_path, Status("stopped", step=8, total=24, started=5.0))
    with recorded(session(tmp_path, step=8), "door"):
        assert read_status(tmp_path).started == 5.0
    with recorded(session(tmp_path, step=0), "door"):
        assert read_status(tmp_path).started > 5.0


def test_a_finished_run_keeps_its_word(tmp_path):
    before = Status("finished", step=24, total=24, started=5.0, updated=6.0)
    write_status(tmp_path, before)
    fail(session(tmp_path, step=24), RunFailed("its results cannot be shown again"), at=24)
    with recorded(session(tmp_path, step=24), "door") as note:
        note("finished")
    assert read_status(tmp_path) == before


def test_a_damaged_word_is_written_anew(tmp_path):
    (tmp_path / STATUS_FILE).write_text("{")
    with recorded(session(tmp_path, step=8), "door"):
        assert read_status(tmp_path).state == "running"


def test_signals_by_name():
    assert by_signal(signal.SIGTERM) == "received SIGTERM"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_process_that_ended_has_no_start_even_before_its_parent_asks():
    child = subprocess.Popen(["sleep", "100"])
    alive = process_start(child.pid)
    since = time.clock_gettime(time.CLOCK_BOOTTIME) - alive / os.sysconf("SC_CLK_TCK")
    child.kill()
    deadline = time.monotonic() + 10
    while process_start(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert -1 < since < 60
    assert process_start(child.pid) is None  # a zombie
    child.wait()
    assert process_start(child.pid) is None
    assert process_start(os.getpid()) <= alive


def test_the_file_is_json_for_anybody(tmp_path):
    write_status(tmp_path, Status("running", reason="über"))
    assert json.loads((tmp_path / STATUS_FILE).read_text())["reason"] == "über"
