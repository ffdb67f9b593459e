"""Several processes that train together, started here without a launcher's own process."""

import socket
import subprocess

from tests.integration.conftest import Door


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def together(door: Door, world: int, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """``python ARGUMENTS`` in ``world`` processes; what each said, in rank order.

    One alone is started as a user does, without any of the variables.
    """
    port, command = free_port(), door.command(*arguments)
    ranks = [
        {"RANK": str(r), "WORLD_SIZE": str(world), "LOCAL_RANK": str(r)}
        | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world)}
        for r in range(world)
    ]
    running = [
        subprocess.Popen(
            command,
            cwd=door.folder,
            env=door.env | (rank if world > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    done = []
    for process in running:
        out, errors = process.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(command, process.returncode, out, errors))
    return done
