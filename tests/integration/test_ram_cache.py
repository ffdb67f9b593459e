"""Decoded images in memory, of a whole run: said before it, gone after it, also if stopped."""

import signal

import pytest

from tests.forks import Fork
from tests.integration.test_one_folder import pictures
from tests.integration.test_resume import wait_for

# The door, on a file system in memory that no other run is on.
SCRIPT = """
import sys
from ssl_vit import pretrain
from ssl_vit.commands import cli
from ssl_vit.data import cache
cache.SHARED_MEMORY = sys.argv.pop(1)
cli.run_door(pretrain.main)
"""


@pytest.mark.parametrize(("number", "status"), [(0, 0), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_it_is_said_and_goes_with_the_run(door, number, status):
    shm = door.folder / "shm"
    shm.mkdir()
    (door.folder / "script.py").write_text(SCRIPT)
    options = ("--data.train", pictures(door.folder / "images"), "--data.cache", "ram")
    size = ("--optim.batch-size", "9", "--run.length", "100000st" if number else "9st")
    given = ("mae", "--config", "tiny.yaml", "--run.out", "run", *options, *size)
    run = Fork(("script.py", str(shm), *given), door.folder, door.env)
    if number:
        wait_for(lambda: len(list(shm.glob("*/decoded-images/??/*"))) == 30)
        run.send_signal(number)
    out, errors = run.communicate(timeout=120)
    assert run.returncode == status, errors
    assert "ram: 30 decoded images take about 0.00243 MB; " in out + errors
    assert list(shm.iterdir()) == []
