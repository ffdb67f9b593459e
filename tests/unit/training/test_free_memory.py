"""What memory there is: of the machine, and of the control groups that a scheduler sets."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssl_vit.benchmarks import trial
from ssl_vit.commands.pretraining import build
from ssl_vit.common.errors import RunFailed
from ssl_vit.common.free_memory import free_in_group, limit_of_group, memory_here
from ssl_vit.pretrain import parse_options
from ssl_vit.training.footprint import free_memory
from tests.integration.conftest import TINY


def limit(group: Path, most: str, used: int, unused_files: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {unused_files}\nactive_file 7\n")


def test_the_narrowest_of_the_groups_around_decides(tmp_path):
    root = tmp_path / "cgroup"
    limit(tmp_path, "10", 9)  # not a group
    limit(root / "job", "1000", 700)
    limit(root / "job" / "step", "max", 300)
    limit(root / "job" / "step" / "task", "800", 100)
    assert free_in_group("job/step/task", root) == 300
    assert limit_of_group("job/step/task", root) == 800
    assert limit_of_group("job/step", root) == 1000
    limit(root / "job" / "step" / "task", "800", 600, unused_files=50)
    assert free_in_group("job/step/task", root) == 250
    assert free_in_group("elsewhere", root) == limit_of_group("elsewhere", root) == math.inf
    limit(root, "90", 0)  # as a container sees its own
    assert free_in_group("", root) == 90


def test_processes_of_a_machine_share_its_memory():
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    alone, among_four = (free_memory(torch.device("cpu"), n) for n in (1, 4))
    assert 0 < alone < memory_here() <= machine
    assert among_four == pytest.approx(alone / 4, rel=0.2)


def test_one_process_that_runs_out_of_memory_does_not_keep_the_others_waiting(
    tmp_path, monkeypatch
):
    """Alone it is an answer; among others, who are within a collective, the end."""

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(trial, "_LOADER_SECONDS", 0.02)
    monkeypatch.setattr(trial, "_seconds", no_room)
    (tmp_path / "mae.yaml").write_text(TINY)
    given = ["--config", str(tmp_path / "mae.yaml"), "--run.out", str(tmp_path / "run")]
    session = build(*parse_options(["mae", *given, "--run.device", "cpu"]))
    assert not trial.try_out(session).fits
    session.parallel = replace(session.parallel, world=2)
    with pytest.raises(RunFailed, match="a whole step does not fit"):
        trial.try_out(session)
