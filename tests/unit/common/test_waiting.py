"""Waits sleep where cores are busy: what is chosen, who inherits it, and that doors have it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from launch import here
from ssl_vit.common import waiting
from ssl_vit.common.waiting import CHOICE, choose, crowded, local_processes, quota, threads

ROOT = Path(__file__).parents[3]
# Doors that compute, with options that are read before torch is imported.
DOORS = [
    ["pretrain", "mae"],
    ["evaluate", "knn", "--encoder", "x", "--data.train", "digits"],
    ["export", "--encoder", "x", "--to", "timm"],
    ["visualize", "pca", "--encoder", "x"],
    ["benchmark", "step", "mae"],
    ["embed", "--encoder", "x"],
]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 4 cores, of which ``busy`` were busy in each look (the last is repeated)."""

    def make(*busy: float, cores: int = 4, siblings: int = 1) -> dict[str, int]:
        looks, clock = list(busy), {"looks": 0, "ticks": 0}
        had = [0] * cores

        def write() -> None:
            ticks = clock["ticks"]
            lines = [f"cpu{i} {h} 0 0 {ticks - h} 0 0 0 0 0 0" for i, h in enumerate(had)]
            # Of others, which do not count.
            lines += [f"cpu{cores + i} {ticks} 0 0 0 0 0 0 0 0 0" for i in range(cores)]
            (tmp_path / "stat").write_text("cpu 1 2 3 4\n" + "\n".join(lines) + "\nintr 1\n")

        def sleep(seconds: float) -> None:
            share = looks.pop(0) if len(looks) > 1 else looks[0]
            clock["looks"], clock["ticks"] = clock["looks"] + 1, clock["ticks"] + 100
            for i in range(cores):
                had[i] += round(100 * min(1, max(0, share - i)))
            write()

        for i in range(cores):
            place = tmp_path / f"cpu{i}/topology"
            place.mkdir(parents=True, exist_ok=True)
            (place / "thread_siblings_list").write_text(f"{i // siblings}\n")
        write()
        monkeypatch.setattr(waiting, "_PROC", tmp_path)
        monkeypatch.setattr(waiting, "_SYS", tmp_path)
        monkeypatch.setattr(waiting, "_CGROUP", tmp_path / "cgroup")
        monkeypatch.setattr(waiting.time, "sleep", sleep)
        monkeypatch.setattr(waiting, "usable_cores", lambda: set(range(cores)))
        return clock

    return make


def policy(env: dict[str, str], processes: int = 0) -> str:
    """What ``env`` says of waits once they are chosen."""
    choose(env, processes)
    return env.get("OMP_WAIT_POLICY", "") + " " + env.get(CHOICE, "").partition(" ")[0]


def test_threads_spin_on_idle_cores_and_sleep_beside_other_work(machine):
    machine(0.3)
    assert policy({}) == " spin"
    machine(1.0)
    assert policy({}) == "PASSIVE sleep"
    assert policy({"OMP_NUM_THREADS": "3"}) == " spin", "three cores are idle"


def test_what_is_busy_for_a_moment_does_not_count(machine):
    clock = machine(4.0, 0.0)
    assert policy({}) == " spin"
    assert clock["looks"] == 2
    clock = machine(0.0, 4.0)
    assert policy({}) == " spin"
    assert clock["looks"] == 1, "no longer than it needs"


def test_a_look_is_short():
    """Importing the package must not wait."""
    assert waiting._LOOK * waiting._LOOKS <= 0.1


def test_two_halves_of_a_core_are_one_thread(machine):
    """One of eight is busy: there is a core for each of four threads."""
    machine(1.0, cores=8, siblings=2)
    assert threads({}) == 4
    assert policy({}) == " spin"


@pytest.mark.parametrize("name", waiting.USERS)
def test_a_users_own_setting_wins(machine, name):
    clock = machine(4.0)
    env = {name: "1000"}
    choose(env)
    assert env == {name: "1000"}
    assert not clock["looks"]


def test_one_thread_waits_for_none(machine):
    clock = machine(4.0)
    for env in ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1,2"}, {"MKL_NUM_THREADS": "1"}):
        before = dict(env)
        choose(env)
        assert env == before
    assert not clock["looks"]


def test_a_choice_is_made_once_and_inherited(machine):
    """What a process starts would see its parent at work."""
    machine(0.0)
    env: dict[str, str] = {}
    choose(env)
    (waiting._PROC / str(os.getpid())).mkdir()
    clock, before = machine(4.0), dict(env)
    choose(env)
    assert env == before
    assert not clock["looks"]


@pytest.mark.parametrize("maker", ["1 {here}", "{own} another-node", "x", ""])
def test_a_choice_of_another_machine_or_of_one_that_ended_is_made_anew(machine, maker):
    maker = maker.format(here=platform.node(), own=os.getpid())
    machine(0.0)
    (waiting._PROC / str(os.getpid())).mkdir()
    assert policy({CHOICE: f"sleep {maker}", "OMP_WAIT_POLICY": "PASSIVE"}) == " spin"
    assert policy({CHOICE: f"sleep {maker}", "OMP_WAIT_POLICY": "ACTIVE"}) == "ACTIVE "


def test_processes_that_start_together_do_not_count_as_other_work(machine):
    """Each of them sees the others import."""
    group = {"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "2"}
    machine(1.0)
    assert policy(group) == " spin"
    machine(2.0)
    assert policy({"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "2"}) == "PASSIVE sleep"


def test_more_threads_than_cores_sleep(machine):
    clock = machine(0.0)
    assert policy({"OMP_NUM_THREADS": "5"}) == "PASSIVE sleep"
    assert policy({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "2"}) == "PASSIVE sleep"
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}
    assert policy(slurm) == "PASSIVE sleep"
    assert local_processes(slurm | {"SLURM_CPUS_PER_TASK": "4"}) == 1, "bound to its own"
    assert not clock["looks"], "nothing to look for"


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/run/job", {"cgroup/run/cpu.max": "300000 100000"}),
        ("0::/run/job", {"cgroup/cpu.max": "300000 100000", "cgroup/run/cpu.max": "max 100000"}),
        (
            "3:cpu,cpuacct:/job\n4:memory:/other",
            {
                "cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
                "cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
                "cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
        ),
    ],
)
def test_time_that_a_container_has_not_got_is_no_idle_core(machine, tmp_path, group, files):
    machine(0.0)
    assert quota() == float("inf")
    for name, text in {**files, "self/cgroup": group}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert quota() == 3
    assert crowded(4)
    assert not crowded(3)


def test_cores_beyond_a_quota_may_be_busy(machine, monkeypatch):
    """Threads within the quota want no more cores than they are."""
    monkeypatch.setattr(waiting, "quota", lambda: 4.0)
    machine(8.0, cores=64)
    assert not crowded(4)
    machine(61.0, cores=64)
    assert crowded(4)


def test_without_the_kernels_numbers_nothing_changes(machine, monkeypatch, tmp_path):
    machine(4.0)
    monkeypatch.setattr(waiting, "_PROC", tmp_path / "none")
    assert policy({}) == " spin"


# --- doors --------------------------------------------------------------------------------------


@pytest.fixture
def seen(tmp_path):
    """What a program finds of waits in its environment when it imports torch."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(
        "import os\nprint(os.environ.get('OMP_WAIT_POLICY'), flush=True)\nos._exit(0)"
    )

    def run(*arguments: str, **env: str) -> str:
        path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
        clean = {k: v for k, v in os.environ.items() if k not in (*waiting.USERS, CHOICE)}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=clean | path | env, capture_output=True, text=True)
        return done.stdout.strip() or done.stderr

    return run


MANY = "4096"  # threads, more than cores anywhere, so that what the machine does now is the same


@pytest.mark.parametrize("door", DOORS, ids=" ".join)
def test_every_door_chooses_before_torch_is_imported(seen, door):
    assert seen("-m", f"ssl_vit.{door[0]}", *door[1:], OMP_NUM_THREADS=MANY) == "PASSIVE"


def test_a_notebook_does_too_and_users_win(seen):
    script = "import ssl_vit\nssl_vit.load_encoder"
    assert seen("-c", script, OMP_NUM_THREADS=MANY) == "PASSIVE"
    assert seen("-c", script, OMP_NUM_THREADS=MANY, OMP_WAIT_POLICY="active") == "active"
    assert seen("-c", script, OMP_NUM_THREADS=MANY, GOMP_SPINCOUNT="9") == "None"
    assert seen("-c", script, OMP_NUM_THREADS="1") == "None"


def test_a_child_has_what_its_parent_has(seen):
    """However it is started, and whatever the machine does then."""
    script = "import ssl_vit, subprocess, sys, os\nos.environ['OMP_NUM_THREADS'] = '4096'\n"
    script += "subprocess.run([sys.executable, '-c', 'import ssl_vit, torch'])"
    assert seen("-c", script, OMP_NUM_THREADS=MANY) == "PASSIVE"
    # The parent found one thread for each core, of which it has idle ones.
    idle = "import os, ssl_vit\nimport ssl_vit.common.waiting as w\n"
    idle += "w.forget(os.environ)\nw.crowded = lambda *a: False\nw.choose(os.environ)\n"
    assert seen("-c", idle + script, OMP_NUM_THREADS=MANY) == "None"


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_launcher_chooses_for_all_of_its_tasks(monkeypatch, tasks):
    """Anew for each command of a sweep, whatever was chosen for the launcher itself."""
    wanted = []
    monkeypatch.setattr(waiting, "crowded", lambda *given: bool(wanted.append(given)) or True)
    for name in (*waiting.USERS, CHOICE, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv(CHOICE, f"spin {os.getpid()} {platform.node()}")
    for env in here._environments(tasks):
        assert env["OMP_WAIT_POLICY"] == "PASSIVE"
        assert env[CHOICE] == f"sleep {os.getpid()} {platform.node()}"
    assert wanted == [(3 * tasks, 0)]
