"""What only a GPU can tell, in some minutes: ``pytest -s tests/gpu`` (other tests hide the GPU).

``SSL_VIT_REHEARSE=cpu pytest tests/gpu`` runs the same on the CPU: then only the tests are tried.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssl_vit.benchmarks.device import MEASURED
from ssl_vit.training.parallel import prepare_device
from tests.conftest import ROOT

HERE = Path(__file__).parent
REHEARSED = os.environ.get("SSL_VIT_REHEARSE", "")
WHY = "no CUDA device is seen; where there is one, run pytest tests/gpu alone"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a CUDA device all of this folder is skipped."""
    for item in items:
        if item.path.is_relative_to(HERE) and not (torch.cuda.is_available() or REHEARSED):
            item.add_marker(pytest.mark.skip(reason=WHY))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test, prepared as a run prepares it."""
    chosen = torch.device(REHEARSED) if REHEARSED else torch.device("cuda", 0)
    prepare_device(chosen)
    return chosen


def surroundings(**more: str) -> dict[str, str]:
    """Environment of a process that imports this checkout, and what this process may import."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path} | more


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a line of what was measured, whatever pytest captures."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n{MEASURED}{text}", flush=True)

    return line
