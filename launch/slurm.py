"""One launcher for every door: ``python -m launch.slurm [options] -- pretrain mae ...``.

By submitit: the job runs ``python -m ssl_vit.DOOR ARGUMENTS`` in each of its tasks, which find each
other by Slurm's own environment.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from launch.here import run_here, shown
from launch.job import Job
from launch.options import LaunchConfig, slurm_options, together
from launch.sweep import swept
from ssl_vit.commands.cli import run_door
from ssl_vit.common.config import UserError, check
from ssl_vit.common.layers import parse

_PROG = "python -m launch.slurm"
DOORS = ("pretrain", "evaluate", "export", "visualize", "benchmark", "report", "runs")
# Signals that come before a task is ready for them are lost, rather than end it: when Slurm wants
# the machines back it queues the job again itself. What the task starts has their usual effects.
_PYTHON = shlex.join(["bash", "-c", 'trap "" TERM USR2; exec "$@"', "bash", sys.executable])


class Executor(submitit.SlurmExecutor):
    """submitit's, also where there is no Slurm, to see the batch file."""

    @classmethod
    def affinity(cls) -> int:
        """How far submitit would prefer it to others; there are none."""
        return 1

    def batch_file(self, runs: int) -> str:
        """What would be given to sbatch, for ``runs`` runs of a sweep."""
        self.parameters |= {"map_count": runs} if runs > 1 else {}
        return str(self._make_submission_file_text(self._submitit_command_str, ""))


def executor(config: LaunchConfig, door: str, folder: Path, runs: int) -> Executor:
    """submitit's executor with all that the job asks Slurm for."""
    made = Executor(folder, python=_PYTHON)
    made.update_parameters(
        job_name=f"ssl_vit-{door}",
        nodes=config.nodes,
        ntasks_per_node=config.tasks,
        gpus_per_node=config.gpus_per_node or None,
        cpus_per_task=config.cpus_per_task,
        partition=config.partition or None,
        time=config.time,
        wckey=None,  # submitit's own would be refused where such keys are checked
        setup=list(config.setup) or None,
        array_parallelism=config.at_once or runs,
        srun_args=[
            # Without it the other tasks wait for one that died.
            "--kill-on-bad-exit=1",
            # Process 0 may judge for minutes after the others; a site's WaitTime would end it.
            "--wait=0",
            # A job that was queued again goes on in the same logs.
            "--open-mode=append",
            # srun does not take it from the batch file.
            f"--cpus-per-task={config.cpus_per_task}",
        ],
        additional_parameters={
            "signal": f"USR2@{config.grace}",
            "requeue": True,
            **slurm_options(config.slurm),
        },
    )
    return made


def submit(config: LaunchConfig, door: str, commands: list[list[str]]) -> None:
    """Hand the job to Slurm, and say where it is.

    Raises:
        UserError: there is no Slurm here, or it refuses the job.
    """
    there = shutil.which("sbatch") and shutil.which("srun")
    check(bool(there), "there is no sbatch here: --local runs the job without Slurm")
    folder = private_folder(Path(config.folder).expanduser().absolute(), door)
    try:
        made = executor(config, door, folder, len(commands))
        jobs = made.submit_array([Job(command, folder) for command in commands])
    except FailedJobError as error:
        shutil.rmtree(folder)
        said = str(error).strip().splitlines()
        raise UserError(f"Slurm refuses the job: {said[-1] if said else 'no reason'}") from None
    for job, command in zip(jobs, commands, strict=True):
        paths = job.paths
        print(f"job {job.job_id}: {shown(command)}")
        print(f"output: {paths.stdout}\nerrors: {paths.stderr}")
        print(f"follow: tail -F {shlex.quote(str(paths.stdout))} {shlex.quote(str(paths.stderr))}")
    print(f"cancel: scancel {jobs[0].job_id.partition('_')[0]}")


def private_folder(parent: Path, door: str) -> Path:
    """A new folder that only its owner may enter; so are the parents that it needs."""
    before = os.umask(0o077)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{door}-", dir=parent))
    finally:
        os.umask(before)


def show_only(config: LaunchConfig, door: str, commands: list[list[str]]) -> None:
    """Print what would be submitted, and what each of its tasks runs."""
    if not config.local:
        folder = Path(config.folder).expanduser().absolute() / f"{door}-NAME"
        print(executor(config, door, folder, len(commands)).batch_file(len(commands)))
    tasks = config.nodes * config.tasks
    for i, command in enumerate(commands):
        run = f"run {i}, " if len(commands) > 1 else ""
        print(f"# {run}each of {tasks} tasks: {shown(command)}")


def main(argv: list[str]) -> int:
    """The launcher; returns the exit status."""
    cut = argv.index("--") if "--" in argv else len(argv)
    about = "Run a door as a job: options -- pretrain mae --config ..."
    config = parse(LaunchConfig(), together(argv[:cut]), "command line", _PROG, about)
    door, *arguments = argv[cut + 1 :] or [""]
    if door not in DOORS:
        raise UserError(f"after -- comes a door ({', '.join(DOORS)}) and its arguments")
    check(not config.at_once or bool(config.sweep), "--at-once is for a --sweep")
    given = [sys.executable, "-m", f"ssl_vit.{door}", *arguments]
    commands = swept(given, config.sweep) if config.sweep else [given]
    if config.dry_run:
        show_only(config, door, commands)
    elif config.local:
        return run_here(commands, config.tasks)
    else:
        submit(config, door, commands)
    return 0


if __name__ == "__main__":
    run_door(main)
