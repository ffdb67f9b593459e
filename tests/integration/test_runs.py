"""The door that shows runs: real ones that finished, were stopped or killed, failed, or run."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from ssl_vit import runs
from ssl_vit.runs import RunsConfig
from tests.distributed.together import together
from tests.integration.conftest import KILLER, Door

# Sends a signal to itself at an update that a test chooses.
STOPPER = """
import os, sys
from ssl_vit.commands import cli
from ssl_vit import pretrain
from ssl_vit.training import loop

number, at = int(sys.argv.pop(1)), int(sys.argv.pop(1))
real = loop.Trainer.update

def update(self, parts):
    if self.step == at:
        os.kill(os.getpid(), number)
    return real(self, parts)

loop.Trainer.update = update
cli.run_door(pretrain.main)
"""

# A terminal of its own for `runs --live`: what it draws, and its exit status, are printed as JSON.
TERMINAL = """
import json, os, pty, select, signal, sys, time
from pathlib import Path
from ssl_vit.commands import cli
from ssl_vit import runs

sys.argv = ["runs", "runs", "--live", "--every", "0.1"]
child, terminal = pty.fork()
if child == 0:
    os.environ["TERM"] = "xterm"
    # Whoever runs the tests in the background has it ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.run_door(runs.main)

def seen(until, text=b"", patience=60.0):
    deadline = time.monotonic() + patience
    while until not in text and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                text += os.read(terminal, 65536)
            except OSError:  # the other side is gone
                break
    return text

first = seen(b"1 finished")
first = seen(b"never", first, patience=1.0)  # the rest of the frame
idle = seen(b"never", patience=1.0)
path = Path("runs/done/status.json")
path.write_text(path.read_text().replace('"finished"', '"failed"'))
later = seen(b"1 failed")
os.write(terminal, bytes([3]))  # Ctrl-C
last = seen(b"never", patience=10.0)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
said = [part.decode(errors="replace") for part in (first, idle, later, last)]
print(json.dumps({"said": said, "status": status}))
"""


# With held-out images, and closing scores of few of them.
LOOKING = ("--data.val", "digits:val", "--run.probe-images", "100")


def look(door: Door, *arguments: str) -> str:
    """What the door prints on runs; it must not fail."""
    result = door("-m", "ssl_vit.runs", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def records(door: Door, *arguments: str) -> dict[str, dict]:
    """The runs as programs read them, by the names of their folders."""
    lines = look(door, *arguments, "--json").splitlines()
    return {Path(r["folder"]).name: r for r in map(json.loads, lines)}


def stop(door: Door, out: str, number: int = signal.SIGTERM, at: int = 10) -> None:
    """A tiny run that a signal ends at a step."""
    (door.folder / "stopper.py").write_text(STOPPER)
    options = ("mae", "--config", "tiny.yaml", "--run.out", out)
    result = door("stopper.py", str(int(number)), str(at), *options)
    assert result.returncode in (75, 130), result.stderr


def kill(door: Door, out: str) -> None:
    """A tiny run that is killed in its 14th step."""
    (door.folder / "killer.py").write_text(KILLER)
    result = door("killer.py", "mid-epoch", "mae", "--config", "tiny.yaml", "--run.out", out)
    assert result.returncode == -signal.SIGKILL, result.stderr


def command_of(output: str) -> list[str]:
    """The one command that goes on, as a user would type it."""
    (line,) = re.findall(r"(?m)^  resume: python (.+)$", output)
    return shlex.split(line)


@pytest.fixture(scope="module")
def many(shared_door: Door) -> Door:
    """Runs of every fate, below ``runs``."""
    door = shared_door
    done = door.pretrain("--run.out", "runs/done", *LOOKING, "--run.probe-every", "12st")
    assert done.returncode == 0, done.stderr
    stop(door, "runs/mae/optim.lr=1e-3")
    kill(door, "runs/killed")
    bad = ("--optim.lr", "1e30", "--optim.clip", "0", "--run.max-nonfinite", "1")
    failed = door.pretrain("--run.out", "runs/failed", *bad)
    assert failed.returncode == 1
    return door


def test_every_fate_is_told(many):
    found = records(many, "runs")
    states = {name: run["state"] for name, run in found.items()}
    assert states == {
        "done": "finished",
        "optim.lr=1e-3": "stopped",
        "killed": "killed",
        "failed": "failed",
    }
    assert found["done"]["step"] == found["done"]["total"] == 24
    assert found["done"]["knn"]["knn20_mean"] > 10
    assert found["done"]["resume"] == ""
    assert found["optim.lr=1e-3"]["step"] == 11
    assert found["optim.lr=1e-3"]["said"].startswith("at step 11 of 24: received SIGTERM")
    assert found["killed"]["step"] == 13
    assert "newest checkpoint is at step 8" in found["killed"]["said"]
    assert "not finite" in found["failed"]["said"]
    assert all(run["problems"] == [] for run in found.values())
    assert all(run["status"]["name"] == "mae" for run in found.values())
    assert next(iter(found)) == "failed"  # the newest first


def test_table_fits_80_columns(many):
    text = look(many, "runs")
    rows = [line for line in text.splitlines() if not line.startswith("  ")]
    assert max(map(len, rows)) <= 80
    assert text.startswith("4 runs: ")
    for word in ("mae/optim.lr=1e-3", "vit_tiny", "8 px, 2", "24/24", "100%", "finished", "killed"):
        assert word in text
    assert text.count("resume: ") == 3
    assert "\x1b" not in text


def test_a_stopped_run_goes_on_by_the_command_that_is_printed(many):
    shutil.copytree(many.folder / "runs/mae", many.folder / "apart/mae")
    before = records(many, "apart")["optim.lr=1e-3"]["status"]
    command = command_of(look(many, "apart"))
    assert command[-2:] == ["--run.out", "apart/mae/optim.lr=1e-3"]  # it has been moved
    assert many(*command).returncode == 0
    run = records(many, "apart")["optim.lr=1e-3"]
    assert (run["state"], run["step"], run["resume"]) == ("finished", 24, "")
    assert run["status"]["started"] == before["started"] < run["status"]["updated"]
    assert records(many, "runs")["optim.lr=1e-3"]["state"] == "stopped"


def test_a_killed_run_goes_on_by_the_command_that_is_printed(many):
    command = command_of(look(many, "runs/killed"))
    assert command == ["-m", "ssl_vit.pretrain", "mae", "--config", "runs/killed/config.yaml"]
    before = (many.folder / "runs/killed").rename(many.folder / "runs/aside")
    shutil.copytree(before, many.folder / "runs/killed")
    assert many(*command).returncode == 0
    assert records(many, "runs/killed")["killed"]["state"] == "finished"
    shutil.rmtree(many.folder / "runs/killed")
    before.rename(many.folder / "runs/killed")


def test_the_command_of_a_finished_run_leaves_it_finished(many):
    path = many.folder / "runs/done/status.json"
    before = path.read_bytes()
    again = many("-m", "ssl_vit.pretrain", "mae", "--config", "runs/done/config.yaml")
    assert again.returncode == 0
    assert path.read_bytes() == before


def test_interrupted(door):
    stop(door, "run", signal.SIGINT, at=3)
    (run,) = records(door, "run").values()
    assert (run["state"], run["step"]) == ("stopped", 4)
    assert run["said"].startswith("at step 4 of 24: received SIGINT")


def test_of_several_processes_one_tells(door):
    options = ("mae", "--config", "tiny.yaml", "--run.out", "run", "--optim.lr", "1e30")
    bad = ("--optim.clip", "0", "--run.max-nonfinite", "1")
    ends = together(door, 2, "-m", "ssl_vit.pretrain", *options, *bad)
    assert [end.returncode for end in ends] == [1, 1]
    (run,) = records(door, "run").values()
    assert (run["state"], run["status"]["processes"]) == ("failed", 2)
    assert "resume (it ran in 2 processes): python" in look(door, "run")


def test_a_run_that_still_runs(door):
    running = door.start("--run.out", "run", "--run.length", "100000st")
    try:
        deadline = time.monotonic() + 60
        while (
            not (door.folder / "run/metrics.jsonl").exists()
            or "loss" not in (door.folder / "run/metrics.jsonl").read_text()
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (run,) = records(door, "run").values()
        text = look(door, "run")
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=30)
    assert (run["state"], run["resume"], run["said"]) == ("running", "", "")
    assert run["total"] == 100000
    assert run["seconds_left"] > 0
    assert "resume" not in text
    (run,) = records(door, "run").values()
    assert run["state"] == "killed"


def test_another_process_has_the_number_now(many):
    """The run's process is gone, and one that lives has its number."""
    folder = many.folder / "reused/run"
    shutil.copytree(many.folder / "runs/killed", folder)
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"pid": os.getpid()}))
    assert records(many, "reused")["run"]["state"] == "killed"


def test_damaged_folders_are_shown_with_what_is_wrong(many):
    broken = many.folder / "broken"
    for name in ("binary", "no-config", "empty", "torn-status"):
        shutil.copytree(many.folder / "runs/done", broken / name)
    (broken / "binary/metrics.jsonl").write_bytes(bytes(range(256)) * 40)
    (broken / "no-config/config.yaml").unlink()
    for file in ("config.yaml", "metrics.jsonl", "status.json", "encoder.safetensors"):
        (broken / "empty" / file).write_bytes(b"")
    (broken / "torn-status/status.json").write_text('{"state": "finis')
    found = records(many, "broken")
    assert found["binary"]["state"] == "finished"
    assert "cannot be read, ignored" in found["binary"]["problems"][0]
    assert found["no-config"]["problems"] == ["broken/no-config/config.yaml: not there"]
    assert found["no-config"]["state"] == "finished"
    assert len(found["empty"]["problems"]) == 3
    assert "status.json is damaged" in found["torn-status"]["problems"][0]
    assert found["torn-status"]["state"] == "finished"
    text = look(many, "broken")
    assert text.count("problem: ") == sum(len(run["problems"]) for run in found.values())


def test_runs_of_before_there_was_a_status(many):
    """What became of them is told by their files."""
    for name in ("done", "killed"):
        shutil.copytree(many.folder / "runs" / name, many.folder / "old" / name)
        (many.folder / "old" / name / "status.json").unlink()
    ago = time.time() - 7200
    os.utime(many.folder / "old/killed/metrics.jsonl", (ago, ago))
    found = records(many, "old")
    assert (found["done"]["state"], found["done"]["total"]) == ("finished", 24)
    assert (found["killed"]["state"], found["killed"]["method"]) == ("stopped", "mae")
    assert command_of(look(many, "old"))[:4] == ["-m", "ssl_vit.pretrain", "mae", "--config"]


def test_fine_tuning_inside_a_run(many):
    sets = ("--data.train", "digits:train", "--data.val", "digits:val", "--data.channels", "1")
    few = ("--run.length", "2st", "--run.out", "inside/run/finetune", "--data.workers", "0")
    shutil.copytree(many.folder / "runs/done", many.folder / "inside/run")
    tune = ("-m", "ssl_vit.evaluate", "finetune", "--encoder", "inside/run")
    result = many(*tune, *sets, *few)
    assert result.returncode == 0, result.stderr
    found = records(many, "inside")
    assert found["finetune"]["method"] == "finetune"
    assert (found["finetune"]["state"], found["finetune"]["step"]) == ("finished", 2)
    assert "top-1" in look(many, "inside")


def test_live_follows_until_interrupted(many):
    """On a terminal: drawn once while nothing changes, again when something does."""
    folder = many.folder / "terminal"
    folder.mkdir()
    door = Door(folder)
    shutil.copytree(many.folder / "runs/done", folder / "runs/done")
    (folder / "terminal.py").write_text(TERMINAL)
    result = door("terminal.py")
    assert result.returncode == 0, result.stderr
    first, idle, later, last = json.loads(result.stdout)["said"]
    assert "1 finished" in first
    assert idle == ""
    assert "1 failed" in later
    assert "1 failed" in last  # the table stays when it is left
    assert json.loads(result.stdout)["status"] == 0


def test_live_waits_for_as_long_as_it_is_told_or_a_day(monkeypatch):
    """A day, as sleep refuses numbers that are too large."""
    waits: list[float] = []
    monkeypatch.setattr(runs, "scan_runs", lambda *_: [])
    for every in (0.5, 1e300):
        ends = iter([None, KeyboardInterrupt()])

        def sleep(seconds: float, ends=ends) -> None:
            waits.append(seconds)
            if end := next(ends):
                raise end

        monkeypatch.setattr(runs.time, "sleep", sleep)
        runs.follow(Console(file=io.StringIO()), RunsConfig(every=every), [])
    assert waits == [0.5, 0.5, 86400, 86400]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "usage: python -m ssl_vit.runs FOLDER"),
        (("nowhere",), "FOLDER is 'nowhere', no such folder"),
        (("tiny.yaml",), "FOLDER is 'tiny.yaml', a file"),
        (("empty",), "no run in 'empty'"),
        (("empty", "--live"), "no run in 'empty'"),
        (("--live", "empty", "--json"), "--live and --json exclude"),
        (("empty", "--every", "0"), "--every is 0; it must be above 0"),
        (("empty", "--lvie"), "unknown option '--lvie'"),
        (("runs", "--live"), "--live needs a terminal"),
    ],
)
def test_mistakes_are_told_in_one_line(many, arguments, said):
    (many.folder / "empty").mkdir(exist_ok=True)
    result = many("-m", "ssl_vit.runs", *arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_help_states_every_option(many):
    text = look(many, "--help")
    assert max(map(len, text.splitlines()[1:])) <= 80  # the first is the usage
    for option in ("--live", "--every", "--json", "FOLDER"):
        assert option in text
