"""Every method that methods/ holds, by its name there and nowhere else."""

from pathlib import Path

import pytest

from ssl_vit import pretrain
from ssl_vit.methods import method_names
from ssl_vit.methods.base import Method, find_method
from tests.contract.tiny import run_arguments


@pytest.fixture(scope="session", params=method_names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def kind(name: str) -> type[Method]:
    return find_method(name)


@pytest.fixture(scope="session")
def run(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run from its first step to its last; to be read only."""
    folder = tmp_path_factory.mktemp(name) / "run"
    assert pretrain.main(run_arguments(name, "--run.out", str(folder))) == 0
    return folder
