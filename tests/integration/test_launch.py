"""The launcher without Slurm: what it refuses, what it would submit, and jobs on this machine."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.job import going_on
from launch.options import LaunchConfig, seconds
from launch.slurm import DOORS, main, private_folder
from launch.sweep import combinations, swept
from ssl_vit.common.config import RunConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.layers import parse
from tests.conftest import ROOT
from tests.forks import Fork
from tests.integration.conftest import TINY, Door

# Each task writes its number and its world, and does as the line for it says.
TASK = r"""
import os, signal, sys, time
rank = int(os.environ.get("RANK", -1))
world, local = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_RANK")
os.write(1, f"{rank} {world} {local}\n".encode())  # in one piece
done = []
signal.signal(signal.SIGTERM, lambda n, f: done.append(75))
signal.signal(signal.SIGUSR2, lambda n, f: done.append(75))
signal.signal(signal.SIGHUP, lambda n, f: done.append(75))
def sleep():
    open(f"ready{rank}", "w").close()
    for _ in range(1000):
        time.sleep(0.02)
        if done:
            time.sleep(0.3)  # saving takes a while
            sys.exit(done[0])
"""


def here(folder: Path, tasks: int, *lines: str, **popen: object) -> subprocess.Popen[str]:
    """``launch.here`` with tasks that run ``lines``, one for each."""
    script = TASK + "\n".join(f"if rank in ({i}, -1): {line}" for i, line in enumerate(lines))
    return launch_here(folder, tasks, [script], **popen)


def launch_here(
    folder: Path, tasks: int, scripts: list[str], **popen: object
) -> subprocess.Popen[str]:
    """One script after the other."""
    commands = [[sys.executable, "-c", script] for script in scripts]
    call = f"from launch.here import run_here; raise SystemExit(run_here({commands!r}, {tasks}))"
    return subprocess.Popen(
        [sys.executable, "-c", call],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def wait_for(*paths: Path) -> None:
    wait_until(lambda: all(path.exists() for path in paths))


def wait_until(true: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s"
        time.sleep(0.02)


def test_the_doors_are_those_of_the_package():
    modules = (ROOT / "ssl_vit").glob("*.py")
    assert {p.stem for p in modules if "run_door(main)" in p.read_text()} == {*DOORS}


def test_tasks_know_each_other(tmp_path):
    job = here(tmp_path, 2, "sys.exit(0)", "sys.exit(0)")
    out, _ = job.communicate(timeout=20)
    assert (job.returncode, sorted(out.splitlines())) == (0, ["0 2 0", "1 2 1"])


def test_one_task_is_alone(tmp_path):
    job = here(tmp_path, 1, "sys.exit(0)")
    assert job.communicate(timeout=20)[0] == "-1 None None\n"


def test_the_first_task_that_fails_ends_the_others(tmp_path):
    started = time.monotonic()
    job = here(tmp_path, 3, "time.sleep(60)", "time.sleep(1); sys.exit(3)", "time.sleep(60)")
    job.communicate(timeout=30)
    assert job.returncode == 3
    assert time.monotonic() - started < 15
    killed = here(tmp_path, 2, "sys.exit(0)", "os.kill(os.getpid(), signal.SIGKILL)")
    killed.communicate(timeout=20)
    assert killed.returncode == 128 + 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_launcher_reaches_every_task(tmp_path, number):
    job = here(tmp_path, 2, "sleep()", "sleep()")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    job.send_signal(number)
    _, err = job.communicate(timeout=20)
    assert (job.returncode, err) == (
        75,
        "stopped and saved; run the same command again to resume\n",
    )


def test_ctrl_c_of_a_terminal_reaches_the_tasks_once_by_itself(tmp_path):
    """It goes to all processes of the terminal; a second of the launcher's would not save."""
    line = "signal.signal(signal.SIGINT, lambda n, f: sys.exit(9) if done else done.append(75))"
    job = here(tmp_path, 1, f"{line}; sleep()", start_new_session=True)
    wait_for(tmp_path / "ready-1")
    os.killpg(job.pid, signal.SIGINT)
    job.communicate(timeout=20)
    assert job.returncode == 75


def test_after_a_signal_no_other_run_begins(tmp_path):
    """Not even where the run that it came to had its last step behind it, and finished."""
    first = TASK + "done = [0]\nsignal.signal(signal.SIGTERM, lambda n, f: sys.exit(0))\nsleep()"
    first = first.replace("if done:", "if False:")
    job = launch_here(tmp_path, 1, [first, "open('second', 'w')"])
    wait_for(tmp_path / "ready-1")
    job.terminate()
    _, err = job.communicate(timeout=20)
    assert (job.returncode, err) == (
        75,
        "stopped and saved; run the same command again to resume\n",
    )
    assert not (tmp_path / "second").exists()


# The launcher in a fork, whose tasks are forks of it.
LAUNCHER = """
from types import SimpleNamespace

from launch import job
from launch.slurm import main
from ssl_vit.commands.cli import run_door
from tests.forks import Branch

job.subprocess = SimpleNamespace(Popen=Branch)
run_door(main)
"""


def test_a_run_here_is_stopped_and_goes_on(door):
    """Two tasks; the second start loses one, which ends the job."""
    (door.folder / "launcher.py").write_text(LAUNCHER)
    arguments = ("--run.out", "run", "--run.length", "100000st", "--run.save-every", "10000st")
    command = ["launcher.py", "--local", "--tasks-per-node", "2"]
    command += ["--", "pretrain", "mae", "--config", "tiny.yaml", *arguments]
    log = door.folder / "run" / "metrics.jsonl"
    with started(command, door) as job:
        wait_until(lambda: size(log) > 0)
        job.send_signal(signal.SIGTERM)
        _, err = job.communicate(timeout=60)
    assert job.returncode == 75
    assert err.endswith("stopped and saved; run the same command again to resume\n")
    (saved,) = (door.folder / "run" / "checkpoints").iterdir()
    before = size(log)
    with started(command, door) as again:
        wait_until(lambda: size(log) > before)
        os.kill(children(again.process.pid)[1], signal.SIGKILL)
        _, err = again.communicate(timeout=30)
    assert again.returncode == 128 + 9
    assert f"step {int(saved.name.removeprefix('step-'))} of 100000" in err


@contextlib.contextmanager
def started(command: list[str], door: Door) -> Iterator[Fork]:
    """A launcher; in the end nothing is left of it and its tasks, which end with it."""
    job = Fork(command, door.folder, door.env)
    try:
        yield job
    finally:
        job.process.kill()


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def children(parent: int) -> list[int]:
    """The child processes, the first started first."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_a_sweep_here_runs_each_and_a_door_s_error_comes_through(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("tiny.yaml").write_text(TINY)
    run = ["--", "pretrain", "mae", "--config", "tiny.yaml", "--run.out", "runs"]
    # The second cannot be: it ends the sweep, with its own words and status.
    status = main(
        ["--local", "--sweep", "optim.batch-size=120,7000,60", *run, "--run.length", "1st"]
    )
    assert status == 2
    assert "--optim.batch-size is 7000" in capfd.readouterr().err
    assert Path("runs/optim.batch-size=120/encoder.safetensors").is_file()
    assert not Path("runs/optim.batch-size=60").exists()


DRY = ["--nodes", "4", "--gpus-per-node", "8", "--partition", "P", "--time", "2-00:00:00"]
DRY += [
    "--slurm",
    "account=me",
    "--slurm",
    "exclusive",
    "mail-type=END",
    "--setup",
    "module load x",
]


def test_a_dry_run_prints_the_batch_file_without_slurm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    status = main([*DRY, "--dry-run", "--", "pretrain", "mae", "--config", "a b.yaml"])
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert asked >= {
        "nodes=4",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=4",
        "partition=P",
        "time=2-00:00:00",
        "signal=USR2@120",
        "requeue",
        "open-mode=append",
        "account=me",
        "exclusive",
        "mail-type=END",
    }
    assert not [line for line in asked if line.startswith(("array", "wckey"))]
    (srun,) = [shlex.split(line) for line in lines if line.startswith("srun")]
    expected = {"--kill-on-bad-exit=1", "--wait=0", "--open-mode=append", "--cpus-per-task=4"}
    assert expected <= {*srun}
    assert lines.index("module load x") < lines.index("# command")
    assert lines[-1] == ("# each of 32 tasks: python -m ssl_vit.pretrain mae --config 'a b.yaml'")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_sweep_is_an_array(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep = ["--sweep", "optim.lr=1e-4,3e-4", "--sweep", "run.seed=0,1", "--at-once", "2"]
    main([*sweep, "--dry-run", "--", "pretrain", "mae", "--run.out=O"])
    out = capsys.readouterr().out
    assert "#SBATCH --array=0-3%2\n" in out
    assert "run 1, each of 1 tasks: python -m ssl_vit.pretrain mae --optim.lr 1e-4 " in out
    assert out.count("--run.out") == 4


def test_a_sweep_is_every_combination_in_order():
    assert combinations(["optim.lr=3e-4,1e-4", "run.seed=0,1"]) == [
        {"optim.lr": "3e-4", "run.seed": "0"},
        {"optim.lr": "3e-4", "run.seed": "1"},
        {"optim.lr": "1e-4", "run.seed": "0"},
        {"optim.lr": "1e-4", "run.seed": "1"},
    ]


@pytest.mark.parametrize(
    ("given", "sweep", "places"),
    [
        (["--run.out", "O"], "a=1,2", ["--run.out", "O/a=1", "--run.out", "O/a=2"]),
        (["--run.out=O"], "data.train=folder:/x,y", ["O/data.train=folder_x", "O/data.train=y"]),
        (["--run.out", "v1.5"], "k=1,2", ["v1.5/k=1", "v1.5/k=2"]),
        (["--out", "d/s.json"], "k=1,2", ["d/s-k=1.json", "d/s-k=2.json"]),
    ],
)
def test_each_run_of_a_sweep_has_its_own_place(given, sweep, places):
    commands = swept(["p", *given, "--x", "1"], [sweep])
    assert [c[:3] for c in commands] == [["p", "--x", "1"]] * 2
    flat = [part for command in commands for part in command]
    assert [place for place in places if place not in flat] == []


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("1:00:30", 3630),
        ("2-0", 172800),
        ("1-12:30", 131400),
        ("0-0:0:5", 5),
    ],
)
def test_times_are_slurm_s(time, expected):
    assert seconds(time) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2", "--local", "--", "pretrain"], "--nodes is 2; --local allows 1"),
        (["--nodes", "1"], "after -- give a command (pretrain, evaluate, export"),
        (["--", "pretran"], "after -- give a command"),
        (["--nods", "1", "--", "pretrain"], "'--nods' (nearest known: --nodes"),
        (["--time", "2d", "--", "pretrain"], "--time is '2d'; allowed: minutes, MM:SS"),
        (["--time", "0", "--", "pretrain"], "--time is '0'"),
        (["--time", "1:75", "--", "pretrain"], "--time is '1:75'"),
        (["--time", "3", "--", "pretrain"], "signal 60 s early; --time 3 is only 180 s"),
        (["--slurm", "account", "mem=", "--", "pretrain"], "--slurm is 'mem='"),
        (["--slurm", "nodes=3", "--", "pretrain"], "--slurm is 'nodes=3'; use --nodes"),
        (["--slurm", "--", "pretrain"], "--slurm needs a value"),
        (["--at-once", "1", "--", "pretrain"], "--at-once is for a --sweep"),
        (["--sweep", "a=1,2", "--", "pretrain", "mae"], "--sweep needs --run.out FOLDER"),
        (["--sweep", "a", "--", "pretrain", "--out", "o"], "--sweep is 'a'; write option=value"),
        (["--sweep", "a=1,,2", "--", "pretrain", "--out", "o"], "--sweep is 'a=1,,2'; write"),
        (["--sweep", "a=1,1", "--", "pretrain", "--out", "o"], "a value is given twice"),
        (["--sweep", "a=1", "a=2", "--", "pretrain", "--out", "o"], "--sweep has a twice"),
        (["--sweep", "run.out=1,2", "--", "pretrain", "--out", "o"], "its own output anyway"),
    ],
)
def test_what_the_launcher_refuses(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        main(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "resume"),
    [
        ([], "auto"),
        (["--run.resume", "never"], "auto"),
        (["--run.resume=never", "--run.keep", "3"], "auto"),
        (["--run.resume", "never", "--run.resume", "/a/step-00000010"], "/a/step-00000010"),
    ],
)
def test_a_job_begins_anew_only_once(given, resume):
    """As the door's own parser reads the arguments of a later start; the others stay."""
    flags = [flag.replace("--run.", "--") for flag in going_on(given)]
    assert flags[: len(given)] == [flag.replace("--run.", "--") for flag in given]
    assert parse(RunConfig(), flags, "command line", "pretrain").resume == resume


JOB = """
import sys; from pathlib import Path; from launch.job import Job
Job([sys.executable, "-c", sys.argv[1]], Path())()
"""


def test_where_slurm_has_no_commands_the_job_says_that_it_is_not_queued_again(tmp_path):
    env = {"PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "7", "PATH": str(tmp_path)}
    door = "import sys; sys.exit(75)"
    command = [sys.executable, "-c", JOB, door]
    job = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert job.returncode == 75
    assert job.stderr.startswith("stopped, but not requeued: ")
    assert job.stderr.endswith("No such file or directory: 'scontrol'\n")


def test_without_slurm_there_is_no_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not found on this machine; --local"):
        main(["--", "pretrain", "mae"])
    assert list(tmp_path.iterdir()) == []


def test_folders_are_private(tmp_path):
    made = private_folder(tmp_path / "a" / "b", "pretrain")
    assert made.parent == tmp_path / "a" / "b"
    assert {p.stat().st_mode & 0o777 for p in (made, made.parent, made.parent.parent)} == {0o700}
    assert private_folder(tmp_path / "a" / "b", "pretrain") != made


def test_one_process_for_each_gpu():
    assert [LaunchConfig(gpus_per_node=8).tasks, LaunchConfig().tasks] == [8, 1]
    assert LaunchConfig(gpus_per_node=8, tasks_per_node=2).tasks == 2
