"""A private real Slurm of two nodes on this machine: its own keys, ports and files."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launch.here import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
# Addresses, so that the first task's machine is found by its name without any name service.
NODES = ("127.0.0.1", "127.0.0.2")

CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
FirstJobId={first}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
# More cores than there are, so that all jobs of the tests run at the same time.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=32
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=32
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
"""


class Cluster:
    """Its daemons, in ``folder``; to be closed, which ends all that runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, []
        self.config = folder / "slurm.conf"
        # What this process starts finds this cluster, and is found again by this.
        self.env = os.environ | {"SLURM_CONF": str(self.config)}

    def start(self) -> None:
        """Start the daemons and wait until both nodes are there."""
        folder, host = self.folder, socket.gethostname()
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        names = {"folder": folder, "host": host, "user": getpass.getuser()}
        # The ports of a job's processes follow from its number: not those of a cluster beside it.
        first, ports = random.SystemRandom().randrange(1, 1_000_000), free_ports(3)
        self.config.write_text(CONFIG.format(first=first, ports=ports, nodes=NODES, **names))
        files = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munge.log"}
        files |= {"pid-file": "munge.pid", "seed-file": "munge.seed"}
        # --force: others cannot enter this folder, and need not.
        self._daemon(
            "munged", "--foreground", "--force", *(f"--{k}={folder / v}" for k, v in files.items())
        )
        wait_until(lambda: (folder / "munge.socket").exists(), "munged", 15)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        wait_until(lambda: self._idle() == 2, f"two idle nodes; see {folder}/*.log", 30)

    def _daemon(self, name: str, *arguments: str) -> None:
        log = (self.folder / f"{name}-{len(self.daemons)}.log").open("w")
        started = subprocess.Popen(
            [find(name) or name, *arguments],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self.daemons.append(started)

    def _idle(self) -> int:
        told = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "main", "-o", "%t"],
            env=self.env,
            capture_output=True,
            text=True,
        )
        return told.stdout.split().count("idle")

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands says."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, Restarts, ExitCode ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", job)))

    def wait_for(self, job: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """The job, once it is in one of ``states``."""
        wait_until(lambda: self.show(job)["JobState"] in states, f"{job}: {states}", seconds)
        return self.show(job)

    def start_again(self, job: str) -> None:
        """A job that was queued again waits for two minutes; this one does not."""
        update = ["scontrol", "update", f"JobId={job}", "StartTime=now"]

        def started() -> bool:
            if self.show(job)["JobState"] == "RUNNING":
                return True
            # Again and again: the wait is set only when all of its last start has ended.
            subprocess.run(update, env=self.env, capture_output=True)
            time.sleep(0.3)
            return False

        self.wait_for(job, "PENDING")
        time.sleep(3)  # its credential was revoked, and is for this second too
        wait_until(started, f"{job} to start again", 60)

    def processes(self, *having: str) -> list[int]:
        """All that runs in this cluster, daemons too, with these variables in its environment."""
        wanted, found = {f"SLURM_CONF={self.config}", *having}, []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended, or is another user's
                continue
            if wanted <= {*variables} and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        return found

    def close(self) -> None:
        """End all that runs in it, and itself: nothing of it is needed again."""
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for daemon in self.daemons:
                daemon.wait()


def find(daemon: str) -> str | None:
    """Where a daemon is; in folders that a user's path may lack, too."""
    return shutil.which(daemon, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens to now."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return [*ports]


def wait_until(true: Callable[[], bool], what: str, seconds: float) -> None:
    """Wait for something to come true, for at most ``seconds``."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.2)  # most of these ask Slurm, by a process of its own
