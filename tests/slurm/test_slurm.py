"""Jobs on a real Slurm of two nodes, submitted by the launcher; they run at the same time."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.job import Job
from launch.options import LaunchConfig
from launch.slurm import executor, main, private_folder
from tests.conftest import ROOT
from tests.integration.conftest import TINY
from tests.slurm.cluster import Cluster, wait_until

# With a loader worker, which gets every signal too.
SLOW = TINY.replace("workers: 0", "workers: 1")
# Python's own hook for what is done at every start: a step waits, and leaves the cores to others,
# for whom jobs that run until they are told to stop would otherwise compute for minutes.
WAITING = """
import importlib.abc, importlib.util, sys, time

class Waiting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "ssl_vit.training.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def executed(module):
            execute(module)
            update = module.Trainer.update
            module.Trainer.update = lambda *given: time.sleep(0.3) or update(*given)

        spec.loader.exec_module = executed
        return spec

sys.meta_path.insert(0, Waiting())
"""
STEPS = 30
FINITE = ["--run.length", f"{STEPS}st", "--run.save-every", "1000st"]
ENDLESS = ["--run.length", "100000st", "--run.save-every", "100000st"]

# What tasks do that are no doors: they show what becomes of a job, and start at once.
SLEEP = "import time; time.sleep(300)"
# The second fails; the first ends by the signal that follows, the others hang.
ONE_FAILS = """
import os, signal, sys, time
rank = int(os.environ["SLURM_PROCID"])
signal.signal(signal.SIGTERM, signal.SIG_IGN if rank > 1 else signal.SIG_DFL)
time.sleep(1)
sys.exit(1) if rank == 1 else time.sleep(300)
"""


class Jobs:
    """All jobs that the tests look at, in ``folder``; the names are those of their run folders."""

    undisturbed: "subprocess.Popen[str]"

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.number: dict[str, str] = {}

    def launch(self, name: str, *arguments: str) -> None:
        """Submit through the launcher."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main([*arguments]) == 0
        self.number[name] = re.findall(r"job (\d+)", out.getvalue())[0]

    def submit(self, name: str, code: str, runs: int = 1, **options: int) -> None:
        """Submit other tasks than doors: Python code."""
        config = LaunchConfig(cpus_per_task=1, **options)
        folder = private_folder(Path("slurm").absolute(), name)
        made = executor(config, name, folder, runs)
        jobs = made.submit_array([Job([sys.executable, "-c", code], folder)] * runs)
        self.number[name] = jobs[0].job_id.partition("_")[0]

    def log(self, name: str, task: int | str = 0) -> str:
        """What a task of a job has said on standard error."""
        (path,) = self.folder.glob(f"slurm/*/{self.number[name]}_{task}_log.err")
        return path.read_text()

    def steps(self, name: str) -> list[int]:
        """The steps in a run's metrics, in order."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        found = [re.search(r'"step": (\d+)', line) for line in lines if '"loss"' in line]
        return [int(step[1]) for step in found if step]

    def wait_for_steps(self, name: str, count: int = 3) -> None:
        wait_until(lambda: len(self.steps(name)) >= count, f"steps of {name}", 150)

    def stopped_at(self, name: str) -> int:
        """The step at which a run was stopped and saved, once."""
        (step,) = re.findall(r"stopped at step (\d+), saved", self.log(name))
        return int(step)

    def wait_for(self, name: str, *states: str, seconds: float = 120) -> dict[str, str]:
        return self.cluster.wait_for(self.number[name], *states, seconds=seconds)

    def ask(self, *command: str) -> str:
        return self.cluster.ask(*command)


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "slow.yaml").write_text(SLOW)
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "sitecustomize.py").write_text(WAITING)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SLURM_CONF", str(cluster.config))
        patch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("SSL_VIT_CACHE", str(folder / "cache"))
        jobs = Jobs(cluster, folder)
        submit_all(jobs)
        with srun_alone() as jobs.undisturbed:
            yield jobs
            jobs.undisturbed.kill()


def srun_alone() -> "subprocess.Popen[str]":
    """A door without the launcher, and the run that nothing happens to."""
    door = [sys.executable, "-m", "ssl_vit.pretrain", "mae", "--config", "slow.yaml"]
    return subprocess.Popen(
        ["srun", "--nodes=2", "--ntasks=2", *door, "--run.out", "undisturbed", *FINITE],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def submit_all(jobs: Jobs) -> None:
    """The jobs of all tests: what takes long first, in the order of the tests."""
    two, one = ["--nodes", "2", "--cpus-per-task", "1"], ["--cpus-per-task", "1"]
    slow = ["--", "pretrain", "mae", "--config", "slow.yaml", "--run.out"]
    tiny = ["--", "pretrain", "mae", "--config", "tiny.yaml", "--run.length", "1st", "--run.out"]
    # So many cores that another job needs this one's.
    low = [*two[:3], "16", "--partition", "low"]
    anew = ["--run.resume", "never"]
    jobs.launch("limited", *two, "--grace", "119", *slow, "limited", *ENDLESS, *anew)
    jobs.launch("preempted", *low, *slow, "preempted", *FINITE)
    jobs.launch("killed", *two, *slow, "killed", *ENDLESS)
    jobs.submit("early", SLEEP, nodes=2)
    jobs.submit("array", SLEEP, runs=2)
    jobs.submit("one_fails", ONE_FAILS, nodes=2, tasks_per_node=2)
    jobs.launch("refused", *one, *tiny, "refused", "--optim.batch-size", "0")
    jobs.launch("sweep", *one, "--sweep", "optim.lr=1e-4,3e-4", *tiny, "sweep")


@pytest.fixture(scope="module")
def preempted(jobs: Jobs) -> int:
    """The step at which a job with more right to its cores has stopped the one; it runs again."""
    jobs.wait_for_steps("preempted")
    more = ["--partition=main", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=20"]
    taken = jobs.ask("sbatch", *more, "--parsable", "--output=/dev/null", "--wrap=sleep 1").strip()
    assert jobs.wait_for("preempted", "PENDING", "COMPLETED")["Restarts"] == "1"
    jobs.cluster.wait_for(taken, "COMPLETED")
    jobs.cluster.start_again(jobs.number["preempted"])
    return jobs.stopped_at("preempted")


@pytest.fixture(scope="module")
def limited(jobs: Jobs) -> str:
    """The number of a job whose time is limited from now on, and that Slurm stops for it.

    Slurm looks at the limits every 30 s: the other tests are not kept waiting for that.
    """
    number = jobs.number["limited"]
    jobs.wait_for_steps("limited")
    ran = sum(
        int(part) * scale
        for part, scale in zip(
            jobs.cluster.show(number)["RunTime"].split(":"), (3600, 60, 1), strict=True
        )
    )
    # One to two minutes from now, of which Slurm sends USR2 at its next look.
    jobs.ask("scontrol", "update", f"JobId={number}", f"TimeLimit={ran // 60 + 2}")
    return number


def test_a_preempted_job_is_queued_again(limited, preempted):
    """The first test, so that the job is not done before."""
    assert 3 <= preempted < STEPS


def test_a_job_that_is_told_to_stop_before_it_is_ready_is_queued_again(jobs):
    jobs.wait_for("early", "RUNNING")
    wait_until(lambda: len(tasks_of(jobs, "early")) == 2, "both tasks", 60)
    jobs.ask("scancel", "--signal=USR2", jobs.number["early"])
    assert jobs.wait_for("early", "PENDING")["Restarts"] == "1"
    assert "stopped; the job is requeued\n" in jobs.log("early")


def test_one_that_is_never_ready_ends_the_second_time(jobs):
    jobs.cluster.start_again(jobs.number["early"])
    wait_until(lambda: len(tasks_of(jobs, "early")) == 2, "both tasks", 60)
    jobs.ask("scancel", "--signal=USR2", jobs.number["early"])
    ended = jobs.wait_for("early", "FAILED", "PENDING", "COMPLETED", seconds=30)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1")
    assert "not finished at the time limit, and nothing was saved" in jobs.log("early")


def test_of_an_array_only_the_run_that_was_stopped_is_queued_again(jobs):
    """The last one's plain number is that of the whole array."""
    first, last = (f"{jobs.number['array']}_{i}" for i in range(2))
    for run in (first, last):
        jobs.cluster.wait_for(run, "RUNNING")
    wait_until(lambda: len(tasks_of(jobs, "array")) == 2, "both runs", 60)
    jobs.ask("scancel", "--signal=USR2", last)
    assert jobs.cluster.wait_for(last, "PENDING")["Restarts"] == "1"
    assert jobs.cluster.show(first)["JobState"] == "RUNNING"
    jobs.ask("scancel", jobs.number["array"])


def test_a_job_at_its_time_limit_saves_and_goes_on_at_the_step(jobs, limited):
    """Then it is cancelled: the same signal, after which it must not come back."""
    assert jobs.wait_for("limited", "PENDING")["Restarts"] == "1"
    stopped = jobs.stopped_at("limited")
    jobs.ask("scontrol", "update", f"JobId={limited}", "TimeLimit=60")
    jobs.cluster.start_again(limited)
    jobs.wait_for_steps("limited", stopped + 3)
    assert f"step-{stopped:08}: step {stopped} of 100000" in jobs.log("limited")
    jobs.ask("scancel", limited)
    assert jobs.wait_for("limited", "CANCELLED", "PENDING")["JobState"] == "CANCELLED"
    assert "stopped; Slurm ends the job itself (cancelled" in jobs.log("limited")
    steps = jobs.steps("limited")
    assert steps == list(range(1, len(steps) + 1))


def tasks_of(jobs: Jobs, name: str) -> list[int]:
    """The processes that a job's tasks started, and that are their own program by now."""
    runs = f"SLURM_JOB_NAME=ssl_vit-{name}"
    found = []
    for pid in jobs.cluster.processes(runs):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            found += [pid] if SLEEP in words else []
    return found


def test_a_failure_is_not_taken_for_a_stop(jobs):
    """Slurm ends the other tasks by the signal that it also asks to save with."""
    ended = jobs.wait_for("one_fails", "FAILED", "PENDING", "COMPLETED")
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert jobs.log("one_fails", 1) == "task 1 failed with status 1\n"
    assert "not requeued: task 1 failed with status 1" in jobs.log("one_fails")
    # Sooner than Slurm itself would lose patience, after 30 seconds.
    hours, minutes, seconds = map(int, ended["RunTime"].split(":"))
    assert (hours, minutes) == (0, 0)
    assert seconds < 25


def test_a_task_that_dies_ends_the_job_within_seconds(jobs):
    jobs.wait_for_steps("killed")
    (door,) = doors(jobs, "killed", "SLURM_PROCID=1")
    began = time.monotonic()
    os.kill(door, signal.SIGKILL)
    ended = jobs.wait_for("killed", "FAILED", "PENDING", "COMPLETED", seconds=20)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert time.monotonic() - began < 20
    assert "task 1 was ended by signal 9" in jobs.log("killed", 1)


def doors(jobs: Jobs, name: str, *having: str) -> list[int]:
    """The doors that a job's tasks started; not their loader workers."""
    found = []
    for pid in jobs.cluster.processes(f"SLURM_JOB_ID={jobs.number[name]}", *having):
        with contextlib.suppress(OSError):
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            started_by = Path(f"/proc/{parent}/cmdline").read_bytes()
            found += [pid] if b"submitit.core._submit" in started_by else []
    return [
        pid for pid in found if b"ssl_vit.pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_a_preempted_job_ends_as_if_nothing_had_happened(jobs, preempted):
    jobs.wait_for("preempted", "COMPLETED")
    assert f"step-{preempted:08}: step {preempted} of {STEPS}" in jobs.log("preempted")
    assert jobs.steps("preempted") == list(range(1, STEPS + 1))
    said, _ = jobs.undisturbed.communicate(timeout=120)
    assert jobs.undisturbed.returncode == 0, said
    assert "effective batch │ 120 = 2 processes x 1 parts x 60" in said
    assert weights(jobs.folder / "preempted") == weights(jobs.folder / "undisturbed")


def weights(run: Path) -> dict[str, bytes]:
    """All tensors that a run has ended with: weights, moments, the encoder's file."""
    files = sorted((run / "checkpoints" / f"step-{STEPS:08}").glob("*.safetensors"))
    assert len(files) >= 2
    return {file.name: file.read_bytes() for file in [*files, run / "encoder.safetensors"]}


def test_a_sweep_of_two_has_two_folders(jobs):
    for i, lr in enumerate(("1e-4", "3e-4")):
        assert jobs.cluster.wait_for(f"{jobs.number['sweep']}_{i}", "COMPLETED", "FAILED")
        run = jobs.folder / "sweep" / f"optim.lr={lr}"
        assert (run / "encoder.safetensors").is_file(), jobs.log("sweep", f"{i}_0")
        assert f"lr: {float(lr)}" in (run / "config.yaml").read_text()


def test_a_user_s_mistake_ends_the_job_with_its_words(jobs):
    ended = jobs.wait_for("refused", "FAILED", "PENDING", "COMPLETED")
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert ended["ExitCode"] == "2:0"
    assert "error: command line: --optim.batch-size is 0; " in jobs.log("refused")
