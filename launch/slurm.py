"""One launcher for every door: ``python -m launch.slurm [options] -- pretrain mae ...``.

By submitit: the job runs ``python -m ssl_vit.DOOR ARGUMENTS`` in each of its tasks, with the
environment that torch.distributed reads.
"""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import submitit

from ssl_vit.cli import run_door
from ssl_vit.config import UserError, check
from ssl_vit.options import parse

log = logging.getLogger("ssl_vit")
_PROG = "python -m launch.slurm"
_DOORS = ("pretrain", "evaluate")


@dataclass(frozen=True)
class LaunchConfig:
    """Where and how a job runs. After ``--`` comes the door and its arguments."""

    nodes: int = 1
    """Machines."""
    tasks_per_node: int = 1
    """Processes on each machine, one for each GPU."""
    gpus_per_node: int = 0
    """GPUs on each machine."""
    cpus_per_task: int = 4
    """Cores of each process; its loader workers share them."""
    partition: str = ""
    """Slurm partition. Empty: the cluster's default."""
    minutes: int = 60
    """Time limit in minutes."""
    folder: str = "slurm"
    """Folder of logs and job files."""
    local: bool = False
    """Run the same job here, without Slurm, and wait for it."""

    def __post_init__(self) -> None:
        for option in ("nodes", "tasks_per_node", "cpus_per_task", "minutes"):
            value = getattr(self, option)
            check(value >= 1, f"--{option.replace('_', '-')} is {value}; at least 1")
        check(self.gpus_per_node >= 0, f"--gpus-per-node is {self.gpus_per_node}; 0 or more")
        check(not self.local or self.nodes == 1, f"--nodes is {self.nodes}; --local runs on 1")


class Job:
    """What each task of a job does; submitit carries it there."""

    def __init__(self, door: str, arguments: list[str]) -> None:
        self.command = [sys.executable, "-m", f"ssl_vit.{door}", *arguments]

    def __call__(self) -> int:
        """Run the door as its own process, with the process group's addresses set."""
        # submitit sees one GPU a task as device 0 only if told; our processes choose by LOCAL_RANK.
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        status = subprocess.run(self.command).returncode
        if status:
            raise SystemExit(status)
        return status


def submit(config: LaunchConfig, door: str, arguments: list[str]) -> submitit.Job:
    """Hand the job to Slurm, or start it here."""
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    executor = submitit.AutoExecutor(
        folder=str(folder / "%j"), cluster="local" if config.local else "slurm"
    )
    executor.update_parameters(
        name=f"ssl_vit-{door}",
        nodes=config.nodes,
        tasks_per_node=config.tasks_per_node,
        gpus_per_node=config.gpus_per_node,
        cpus_per_task=config.cpus_per_task,
        timeout_min=config.minutes,
        # Without it Slurm lets the other tasks wait for one that died.
        slurm_srun_args=["--kill-on-bad-exit=1"],
        **({"slurm_partition": config.partition} if config.partition else {}),
    )
    return executor.submit(Job(door, arguments))


def main(argv: list[str]) -> int:
    """The launcher; returns the exit status."""
    cut = argv.index("--") if "--" in argv else len(argv)
    config = parse(LaunchConfig(), argv[:cut], "command line", _PROG, "Run a door as a job.")
    command = argv[cut + 1 :]
    if not command or command[0] not in _DOORS:
        raise UserError(f"after -- comes a door ({', '.join(_DOORS)}) and its arguments")
    job = submit(config, command[0], command[1:])
    paths = job.paths
    print(f"job {job.job_id}: python -m ssl_vit.{shlex.join(command)}")
    print(f"output: {paths.stdout}\nerrors: {paths.stderr}")
    if not config.local:
        print(f"follow: tail -f {paths.stdout}")
        return 0
    try:
        job.results()
    except Exception as error:  # submitit wraps whatever the job died of
        print(paths.stderr.read_text() if paths.stderr.is_file() else error, file=sys.stderr)
        return 1
    print(paths.stdout.read_text(), end="")
    return 0


if __name__ == "__main__":
    run_door(main)
