"""Slurm launcher for every command: ``python -m launch.slurm [options] -- pretrain mae ...``.

It uses submitit. Each task of the job runs ``python -m ssl_vit.COMMAND ARGUMENTS``; the tasks find
each other by Slurm's environment.
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
from launch.options import LaunchConfig, merge_lists, slurm_options
from launch.sweep import swept
from ssl_vit.commands.cli import run_door
from ssl_vit.common.addresses import check_no_secret
from ssl_vit.common.errors import UserError, check
from ssl_vit.common.layers import parse

_PROG = "python -m launch.slurm"
DOORS = ("pretrain", "evaluate", "export", "visualize", "benchmark", "report", "runs", "embed")
# Signals that arrive before a task handles them are ignored, rather than end it: on preemption
# Slurm requeues the job itself. In the task's children they have their usual effects.
_PYTHON = shlex.join(["bash", "-c", 'trap "" TERM USR2; exec "$@"', "bash", sys.executable])


class Executor(submitit.SlurmExecutor):
    """submitit's executor, usable without Slurm to show the batch file."""

    @classmethod
    def affinity(cls) -> int:
        """Priority among submitit's executors, of which there is only this one."""
        return 1

    def batch_file(self, runs: int) -> str:
        """Batch file for sbatch, for ``runs`` runs of a sweep."""
        self.parameters |= {"map_count": runs} if runs > 1 else {}
        return str(self._make_submission_file_text(self._submitit_command_str, ""))


def executor(config: LaunchConfig, door: str, folder: Path, runs: int) -> Executor:
    """Executor with the job's Slurm options."""
    made = Executor(folder, python=_PYTHON)
    made.update_parameters(
        job_name=f"ssl_vit-{door}",
        nodes=config.nodes,
        ntasks_per_node=config.tasks,
        gpus_per_node=config.gpus_per_node or None,
        cpus_per_task=config.cpus_per_task,
        partition=config.partition or None,
        time=config.time,
        wckey=None,  # submitit's default is refused by clusters that check these keys
        setup=list(config.setup) or None,
        array_parallelism=config.at_once or runs,
        srun_args=[
            # Without it the other tasks wait for one that died.
            "--kill-on-bad-exit=1",
            # Process 0 may evaluate for minutes after the others; a site's WaitTime would end it.
            "--wait=0",
            # A requeued job appends to the same logs.
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
    """Submit the job to Slurm, and print its id, its logs and how to cancel it.

    Raises:
        UserError: there is no Slurm on this machine, or it refuses the job.
    """
    there = shutil.which("sbatch") and shutil.which("srun")
    check(bool(there), "sbatch is not found on this machine; --local runs the job without Slurm")
    folder = private_folder(Path(config.folder).expanduser().absolute(), door)
    try:
        made = executor(config, door, folder, len(commands))
        jobs = made.submit_array([Job(command, folder) for command in commands])
    except FailedJobError as error:
        shutil.rmtree(folder)
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines else "no reason given"
        raise UserError(f"Slurm refuses the job: {reason}") from None
    for job, command in zip(jobs, commands, strict=True):
        paths = job.paths
        print(f"job {job.job_id}: {shown(command)}")
        print(f"output: {paths.stdout}\nerrors: {paths.stderr}")
        print(f"follow: tail -F {shlex.quote(str(paths.stdout))} {shlex.quote(str(paths.stderr))}")
    print(f"cancel: scancel {jobs[0].job_id.partition('_')[0]}")


def private_folder(parent: Path, door: str) -> Path:
    """Private folder: new and accessible by its owner only, as are the parents created for it."""
    before = os.umask(0o077)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{door}-", dir=parent))
    finally:
        os.umask(before)


def show_only(config: LaunchConfig, door: str, commands: list[list[str]]) -> None:
    """Dry run: print the batch file and the command of each task."""
    if not config.local:
        folder = Path(config.folder).expanduser().absolute() / f"{door}-NAME"
        print(executor(config, door, folder, len(commands)).batch_file(len(commands)))
    tasks = config.nodes * config.tasks
    for i, command in enumerate(commands):
        run = f"run {i}, " if len(commands) > 1 else ""
        print(f"# {run}each of {tasks} tasks: {shown(command)}")


def main(argv: list[str]) -> int:
    """Slurm launcher; returns the exit status."""
    cut = argv.index("--") if "--" in argv else len(argv)
    about = "Run a command as a job: options -- pretrain mae --config ..."
    config = parse(LaunchConfig(), merge_lists(argv[:cut]), "command line", _PROG, about)
    door, *arguments = argv[cut + 1 :] or [""]
    if door not in DOORS:
        raise UserError(f"after -- give a command ({', '.join(DOORS)}) and its arguments")
    check(not config.at_once or bool(config.sweep), "--at-once is for a --sweep")
    for argument in arguments:  # they are written to files of the job
        check_no_secret(argument)
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
