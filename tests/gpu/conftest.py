"""What only a GPU can tell. Run them alone, ``pytest tests/gpu``: other tests hide the GPU."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WHY = "no CUDA device is seen; where there is one, run pytest tests/gpu alone"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a CUDA device all of this folder is skipped."""
    for item in items:
        if item.path.is_relative_to(HERE) and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=WHY))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test, prepared as a run prepares it."""
    return torch.device("cuda", 0)
