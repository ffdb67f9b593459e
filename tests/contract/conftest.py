"""Every method that methods/ holds, by its name there and nowhere else."""

from pathlib import Path

import pytest

from ssl_vit import pretrain
from ssl_vit.methods import method_names
from ssl_vit.methods.base import Method, find_method
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from ssl_vit.weights.own_files import ENCODER_FILE
from tests.contract.tiny import Pretraining, run_arguments, session


@pytest.fixture(scope="session", params=method_names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def kind(name: str) -> type[Method]:
    return find_method(name)


@pytest.fixture(scope="session")
def made(name: str) -> Pretraining:
    """A tiny run put together; to be looked at only, for tests that change nothing of it."""
    return session(name)


@pytest.fixture(scope="session")
def encoder_options(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options that begin with an encoder's weights."""
    encoder = session(name).task.exported_encoder()
    file = tmp_path_factory.mktemp(f"{name}-encoder") / ENCODER_FILE
    save_encoder(file, encoder, EncoderInfo(encoder.config, 1, (0.3,), (0.4,)))
    return ("--init.encoder", str(file))


@pytest.fixture(scope="session")
def run(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run from its first step to its last; to be read only."""
    folder = tmp_path_factory.mktemp(name) / "run"
    assert pretrain.main(run_arguments(name, "--run.out", str(folder))) == 0
    return folder
