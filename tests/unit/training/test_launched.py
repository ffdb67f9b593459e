"""Launchers' environments, as torchrun and Slurm 22.05 set them."""

import os

import pytest

from ssl_vit.common.errors import UserError
from ssl_vit.training.launched import Launched, first_host, launched

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
# Task 9 of `srun -N 3`, the second on the second machine, of a job that has more machines.
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[001-009]",
    "SLURM_NTASKS": "20",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[003-005]",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
# What a batch script has, and the shell that salloc opens.
BATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[001-002]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Sets the environment to what a launcher gives; what is exported is undone after the test."""

    def set_to(given: dict[str, str]) -> None:
        clean = {k: v for k, v in os.environ.items() if k not in NAMES and "SLURM" not in k}
        monkeypatch.setattr(os, "environ", clean | given)

    return set_to


def exported() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


@pytest.mark.parametrize("given", [{}, BATCH, {"WORLD_SIZE": "1"}, BATCH | {"WORLD_SIZE": "1"}])
def test_alone(environment, given):
    environment(given)
    assert launched() == Launched(0, 1, 0, 1)
    assert "RANK" not in os.environ


def test_a_step_of_one_task_is_alone(environment):
    environment(STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert launched() == Launched()


@pytest.mark.parametrize("around", [{}, BATCH, STEP])
def test_torchrun_is_believed_as_it_is(environment, around):
    environment(around | TORCHRUN)
    assert launched() == Launched(5, 8, 1, 4)
    assert exported() == TORCHRUN


def test_one_process_of_torchrun_needs_no_address(environment):
    environment({"RANK": "0", "WORLD_SIZE": "1"})
    assert launched() == Launched()


def test_a_task_of_slurm(environment):
    environment(STEP)
    assert launched() == Launched(9, 20, 1, 8)
    own = exported()
    assert own["MASTER_ADDR"] == "gpu003"
    assert {n: own[n] for n in NAMES[:4]} == {
        "RANK": "9",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
    }
    assert launched() == Launched(9, 20, 1, 8)
    assert exported() == own


def test_the_last_machine_may_have_fewer_tasks(environment):
    environment(STEP | {"SLURM_PROCID": "17", "SLURM_NODEID": "2"})
    assert launched() == Launched(17, 20, 1, 4)


def test_an_address_that_is_set_is_kept(environment):
    environment(STEP | {"MASTER_ADDR": "head", "MASTER_PORT": "1234", "WORLD_SIZE": "99"})
    assert launched().world == 20
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("head", "1234")


def test_ports_follow_from_job_and_step(environment):
    ports = {}
    for job in (4711, 4712, 900_000_001):
        for step in (0, 1):
            environment(STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
            launched()
            ports[job, step] = int(os.environ["MASTER_PORT"])
    assert len(set(ports.values())) == len(ports)
    assert all(1024 < port < 32768 for port in ports.values())


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-009,12],login", "gpu007"),
        ("gpu[12,07]-ib,x", "gpu12-ib"),
        ("rack[3-4]node[01-10]", "rack3node01"),
        ("a-b.c,d[1-2]", "a-b.c"),
    ],
)
def test_the_first_host(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        (TORCHRUN | {"RANK": "8"}, "RANK is 8; WORLD_SIZE is 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK is 4, LOCAL_WORLD_SIZE 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE 9, WORLD_SIZE 8"),
        (TORCHRUN | {"RANK": "x"}, "RANK is 'x'; it must be a whole number"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1'; it must be a whole number"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "WORLD_SIZE is 8, but MASTER_ADDR is not set"),
        (STEP | {"SLURM_LOCALID": ""}, "SLURM_LOCALID is not set"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "8x2"}, "SLURM_STEP_TASKS_PER_NODE is '8x2'"),
        (STEP | {"SLURM_NODEID": "3"}, "SLURM_NODEID is 3, of 3 machines"),
    ],
)
def test_what_contradicts_itself_is_said(environment, given, message):
    environment(given)
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        launched()
