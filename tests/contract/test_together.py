"""Two processes, sharded or not, and one that compiles, do what one does."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.contract import tiny
from tests.distributed.together import together
from tests.integration.conftest import Door

# Both ways to share, one after the other, in processes that meet once.
PAIR = """
import sys
from ssl_vit import pretrain
from ssl_vit.training.parallel import stop_parallel

for way in ("ddp", "fsdp"):
    pretrain.main([*sys.argv[1:], "--run.parallel", way, "--run.out", way])
stop_parallel()
"""
# Blocks are traced, whole, and what was traced is run as it is: no compiler is needed.
COMPILED = """
import functools, sys, torch
from ssl_vit import pretrain

torch.compile = functools.partial(torch.compile, backend="eager", fullgraph=True)
pretrain.main([*sys.argv[1:], "--run.compile", "True", "--run.out", "compiled"])
"""
# Neither are neighbours painted nor is more saved than what is compared.
TRAINING_ALONE = ("--run.probe-images", "1", "--run.save-every", f"{tiny.STEPS}st")
WAYS = {"ddp": (2, PAIR), "fsdp": (2, PAIR), "compiled": (1, COMPILED)}


@pytest.fixture(scope="session")
def folder_of(name: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the same run in another way; it runs when it is asked for first."""
    door = Door(tmp_path_factory.mktemp(f"{name}-ways"))

    @cache
    def carried_out(world: int, script: str) -> list[str]:
        (door.folder / "script.py").write_text(script)
        done = together(door, world, "script.py", *tiny.run_arguments(name, *TRAINING_ALONE))
        return [process.stderr for process in done if process.returncode]

    def made(way: str) -> Path:
        problems = carried_out(*WAYS[way])
        assert not problems, "\n".join(problems)
        return door.folder / way

    return made


@pytest.mark.parametrize("way", WAYS)
def test_the_same_losses(run, folder_of, way):
    other = folder_of(way)
    for one, two in zip(tiny.losses(run), tiny.losses(other), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_weights_and_encoder(name, run, folder_of, way):
    """Those that are trained and those that follow."""
    other = folder_of(way)
    first = tiny.session(name).task
    tiny.assert_same_training(tiny.state(first), tiny.weights(run), tiny.weights(other))
    files = [load_file(folder / "encoder.safetensors") for folder in (run, other)]
    tiny.assert_same_training(tiny.state(first.exported_encoder().vit), *files)
