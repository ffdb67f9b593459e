"""Several processes that train together, started here without a launcher's own process."""

import subprocess
import time

from launch.here import free_port
from tests.forks import Fork
from tests.integration.conftest import Door

# How long all have together, and how long the others of one that failed, in seconds.
_PATIENCE, _LAST_WORDS = 300.0, 20.0


def together(door: Door, world: int, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """``-m ssl_vit.DOOR ...`` or ``SCRIPT.py ...`` in ``world`` processes; what each said.

    One alone is started as a user does, without any of the variables. Those that do not end are
    killed: their status is -9.
    """
    port = str(free_port())
    running: list[Fork] = []
    try:
        for rank in range(world):
            running.append(Fork(arguments, door.folder, door.env | _places(rank, world, port)))
        _wait(running)
    finally:
        for process in running:
            process.process.kill()
    return [process.done(timeout=10) for process in running]


def _places(rank: int, world: int, port: str) -> dict[str, str]:
    if world == 1:
        return {}
    places = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return {name: str(value) for name, value in places.items()} | address


def _wait(running: list[Fork]) -> None:
    """Until all have ended, or have had their time."""
    deadline = time.monotonic() + _PATIENCE
    while None in (statuses := [process.returncode for process in running]):
        if any(statuses):
            deadline = min(deadline, time.monotonic() + _LAST_WORDS)
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)
