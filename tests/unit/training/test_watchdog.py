"""Who hangs is named, with its stack: alone, and among two real processes with a real store."""

import logging
import re
import subprocess
import sys
import time

import pytest

from ssl_vit.training.watchdog import Watchdog
from tests.conftest import ROOT

# Every scenario is a pair of processes; all pairs run at once. What each said is a file.
SCRIPT = """
import ctypes, logging, os, signal, socket, sys, time
from datetime import timedelta
import torch.distributed as dist
from ssl_vit.training.watchdog import Watchdog

SECONDS = 3.0
folder = sys.argv[1]

def stuck_here():
    time.sleep(1.6 * SECONDS)

def wait_in_c(store):
    try:
        store.wait(["never"], timedelta(seconds=1.7 * SECONDS))
    except Exception:
        pass

def meet(rank, store):
    # Process 0 holds the store: gone before the other has connected, it would block that one.
    store.wait(["1 is there"]) if rank == 0 else store.set("1 is there", "")

def hangs(rank, store, dog):
    dog.at(7, "waiting for images")
    if rank == 0:
        dog.at(7, "computing")
        wait_in_c(store)
    else:
        stuck_here()

def stopped(rank, store, dog):
    dog.at(7, "computing")
    if rank == 1:
        time.sleep(SECONDS / 4)
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_in_c(store)

def first_stopped(rank, store, dog):
    dog.at(7, "computing")
    meet(rank, store)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1.7 * SECONDS)

def abandoned(rank, store, dog):
    stopped(rank, store, dog)
    os.write(2, b"it went on")

def first_killed(rank, store, dog):
    dog.at(7, "computing")
    meet(rank, store)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(SECONDS / 2)

def together(rank, store, dog):
    dog.at(7, "computing")
    stuck_here()

def one_left(rank, store, dog):
    dog.at(7, "saving")
    if rank == 0:
        stuck_here()

def holds_the_interpreter(rank, store, dog):
    dog.at(7, "computing")
    if rank == 1:
        ctypes.PyDLL(None).usleep(int(1.5e6 * SECONDS))
    else:
        wait_in_c(store)

def slow_but_moving(rank, store, dog):
    for step in range(8):
        dog.at(step, "computing")
        time.sleep(SECONDS / 4)

def main(scenario, rank, listening):
    name = f"{folder}/{scenario.__name__}-{rank}"
    out = os.open(name, os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 2)
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    host, port = listening.getsockname()
    # Listening before either process is there: none has to try again.
    server = dict(master_listen_fd=listening.fileno()) if rank == 0 else {}
    store = dist.TCPStore(host, port, 2, rank == 0, **server)
    with Watchdog(rank, 2, SECONDS, store, ends=scenario is abandoned) as dog:
        scenario(rank, store, dog)

scenarios = [hangs, stopped, abandoned, first_stopped, first_killed, together, one_left,
             holds_the_interpreter, slow_but_moving]
children = {}
for i, scenario in enumerate(scenarios):
    listening = socket.create_server(("127.0.0.1", 0))
    for rank in (0, 1):
        pid = os.fork()
        if not pid:
            main(scenario, rank, listening)
            if scenario not in (first_stopped, first_killed):
                os._exit(0)  # quicker than leaving in order
            sys.exit(0)
        children[pid] = f"{scenario.__name__}-{rank}"
stopped = ("stopped-1", "abandoned-1", "first_stopped-0")
for pid, name in sorted(children.items(), key=lambda child: child[1] in stopped):
    if name in stopped:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(name, status)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """What every process of every scenario wrote, and its exit status before it."""
    folder = tmp_path_factory.mktemp("watchdog")
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ends = dict(line.split() for line in done.stdout.splitlines())
    return {name: f"{end}\n{(folder / name).read_text()}" for name, end in ends.items()}


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("process ")]


def test_the_one_that_hangs_says_where(said):
    """The other one, further on and waiting within C code, names it."""
    assert lines(said["hangs-1"])[0].startswith("process 1 (")
    hangs = r"hangs at step 7, waiting for images, for [3-5] s; its stack:\n"
    assert re.search(hangs, said["hangs-1"])
    assert "in stuck_here\n" in said["hangs-1"]
    assert "watchdog" not in said["hangs-1"].split("thread MainThread")[1]
    (line,) = lines(said["hangs-0"])
    assert re.search(r"waits at step 7, computing, for [3-5] s, for process 1 \(", line)
    assert line.endswith(") at step 7, waiting for images")


def test_all_at_the_same_place_say_where(said):
    for rank in (0, 1):
        (line,) = lines(said[f"together-{rank}"])
        assert "hangs at step 7, computing" in line
        assert "in stuck_here\n" in said[f"together-{rank}"]


def test_one_that_is_stopped_is_named_by_another(said):
    (line,) = lines(said["stopped-0"])
    assert line.startswith("process 1 (")
    assert "has not responded since step 7, computing, for more than " in line
    assert "stack" not in said["stopped-0"]


def test_one_that_waits_for_a_stopped_one_is_ended_if_so_asked(said):
    """By its watch thread, while the main thread waits in C; not before it has named the other."""
    status, *rest = said["abandoned-0"].splitlines()
    assert status == "1"
    assert rest[0].startswith("process 1 (")
    assert rest[1:] == ["stopped: another process has exited or did not respond in time"]


def test_the_one_with_the_store_is_stopped(said):
    (line,) = lines(said["first_stopped-1"])
    assert "process 0 or its key-value store has not responded for " in line
    assert said["first_stopped-1"].startswith("0\n"), "it ends all the same"


def test_the_one_with_the_store_is_killed(said):
    assert said["first_killed-0"].startswith("-9\n")
    assert said["first_killed-1"].startswith("0\n"), said["first_killed-1"]
    assert "Traceback" not in said["first_killed-1"]
    assert not lines(said["first_killed-1"])


def test_one_that_has_left_keeps_nobody_waiting(said):
    assert "hangs at step 7, saving" in said["one_left-0"]
    assert not lines(said["one_left-1"])


def test_c_code_that_holds_the_interpreter(said):
    """No thread of Python can run there; the stack is written all the same."""
    assert "Timeout (0:00:03" in said["holds_the_interpreter-1"]
    assert "in holds_the_interpreter" in said["holds_the_interpreter-1"]
    assert "process 1 (" in lines(said["holds_the_interpreter-0"])[0]


def test_those_that_move_say_nothing(said):
    assert said["slow_but_moving-0"] == said["slow_but_moving-1"] == "0\n"


def test_alone_once_for_each_hang(caplog):
    with caplog.at_level(logging.ERROR, logger="ssl_vit"), Watchdog(0, 1, 1.0) as dog:
        for step in (3, 4):
            dog.at(step, "waiting for images")
            dog.at(step, "computing")
            time.sleep(2.2)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2
    for text, step in zip(said, (3, 4), strict=True):
        assert re.search(rf"hangs at step {step}, computing, for [12] s; its stack:\n", text)
        assert "time.sleep(2.2)" in text
