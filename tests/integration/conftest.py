"""Doors as a user calls them: subprocesses, in a folder of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.forks import Fork, can_fork

# A ViT so small that 20 steps take a second; every part of a real run is there but the scores.
TINY = """
run: {length: 24st, save_every: 8st, probe_every: 1000ep, probe_images: 60, log_every: 1}
data: {train: 'digits:train', holdout: 0, channels: 1, workers: 0}
encoder: {arch: vit_tiny_patch16_224, image_size: [8], patch_size: 2, width: 32, depth: 1, heads: 2}
method: {decoder_width: 16, decoder_depth: 1, decoder_heads: 1, flip: 0.0}
optim: {batch_size: 120, lr: 1.0e-3, warmup: 4st}
"""

TINY_DINO = """
run: {length: 24st, save_every: 8st, probe_every: 1000ep, probe_images: 60, log_every: 1}
data: {train: 'digits:train', holdout: 0, channels: 1, workers: 0}
encoder: {arch: vit_tiny_patch16_224, image_size: [8], patch_size: 2, width: 32, depth: 2, heads: 2}
method: {prototypes: 64, head_width: 32, bottleneck: 16, momentum: 0.9, freeze_last_layer: 10st,
  local_crops: 2, local_size: [4], global_scale: [0.6, 1.0], local_scale: [0.2, 0.6], flip: 0.0}
optim: {batch_size: 120, lr: 1.0e-3, warmup: 4st}
"""

# With held-out images: six linear probes at the end, which take far longer than the run.
SCORED = ("--data.val", "digits:val", "--run.probe-images", "10000")

# Pretraining whose linear probes take few steps: how well they learn is shown by their own tests.
QUICK = """
from ssl_vit import pretrain
from ssl_vit.commands import cli
from ssl_vit.evaluators.linear import LinearProtocol

LinearProtocol.steps = lambda self, n: 20
cli.run_door(pretrain.main)
"""

# Kills the process without warning at a moment that a test chooses.
KILLER = """
import os, signal, sys
from ssl_vit.commands import cli
from ssl_vit import pretrain
from ssl_vit.training import checkpoint, loop
from ssl_vit.weights import exchange

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def at_call(n, real):
    calls = iter(range(1, 1000))
    return lambda *a, **k: die() if next(calls) == n else real(*a, **k)

moment = sys.argv.pop(1)
if moment == "mid-epoch":
    loop.Trainer.update = at_call(14, loop.Trainer.update)
    real = loop.Trainer.update
    loop.Trainer.update = lambda self, parts: real(self, parts)
elif moment == "mid-checkpoint":
    # Two files a checkpoint: the fourth is the optimizer's, in the second checkpoint.
    checkpoint.save_file = at_call(4, checkpoint.save_file)
elif moment == "before-encoder":
    exchange.write_own = at_call(2, exchange.write_own)
elif moment == "before-its-name":
    # All of the second checkpoint and its encoder file are on the disk.
    checkpoint.Checkpoints._name = at_call(2, checkpoint.Checkpoints._name)
cli.run_door(pretrain.main)
"""


def outcome(folder: Path) -> list[bytes]:
    """All that a finished run leaves of its training, as bytes."""
    last = folder / "checkpoints" / "step-00000024"
    files = [last / "task.safetensors", last / "optimizer.safetensors"]
    return [f.read_bytes() for f in [*files, folder / "encoder.safetensors"]]


def recount(checkpoint: Path) -> None:
    """Make a checkpoint whose files were changed by hand pass for whole."""
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"] = {name: (checkpoint / name).stat().st_size for name in state["files"]}
    (checkpoint / "state.json").write_text(json.dumps(state))


class Door:
    """Runs ``python -m ssl_vit...`` in ``folder`` with one thread, and keeps what it said.

    Doors and scripts are forks of a process that has imported the package.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tiny.yaml").write_text(TINY)
        (folder / "tiny_dino.yaml").write_text(TINY_DINO)
        (folder / "quick.py").write_text(QUICK)
        self.env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "80",
            "SSL_VIT_CACHE": str(folder / "cache"),
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, *arguments]

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``door("-m", "ssl_vit.pretrain", ...)``: what ``python`` does with these arguments."""
        if can_fork(arguments):
            return Fork(arguments, self.folder, self.env).done(timeout=300)
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def pretrain(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The tiny run with changes."""
        return self("-m", "ssl_vit.pretrain", "mae", "--config", "tiny.yaml", *arguments)

    def dino(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The tiny run of DINO with changes."""
        return self("-m", "ssl_vit.pretrain", "dino", "--config", "tiny_dino.yaml", *arguments)

    def quick(self, method: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The tiny run of a method with changes, and with short linear probes."""
        config = {"mae": "tiny.yaml", "dino": "tiny_dino.yaml"}[method]
        return self("quick.py", method, "--config", config, *arguments)

    def start(self, *arguments: str) -> Fork:
        """The same as ``pretrain``, without waiting."""
        door = ("-m", "ssl_vit.pretrain", "mae", "--config", "tiny.yaml")
        return Fork((*door, *arguments), self.folder, self.env)


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path)


@pytest.fixture(scope="module")
def shared_door(tmp_path_factory: pytest.TempPathFactory) -> Door:
    """One folder for the tests of a module, for what is made once and looked at often."""
    return Door(tmp_path_factory.mktemp("door"))
