"""Several processes that train together, started here without a launcher's own process."""

import socket
import subprocess

from tests.forks import Fork
from tests.integration.conftest import Door


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def together(door: Door, world: int, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """``-m ssl_vit.DOOR ...`` or ``SCRIPT.py ...`` in ``world`` processes; what each said.

    One alone is started as a user does, without any of the variables.
    """
    port = str(free_port())
    running: list[Fork] = []
    for rank in range(world):
        places = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        env = {k: str(v) for k, v in places.items()} | {"MASTER_ADDR": "localhost"}
        env = door.env | (env | {"MASTER_PORT": port} if world > 1 else {})
        running.append(Fork(arguments, door.folder, env))
    return [process.done(timeout=300) for process in running]
