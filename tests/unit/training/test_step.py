"""What a training step does no more often than it must."""

import contextlib
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.commands.pretraining import build
from ssl_vit.data.loader import TrainImages
from ssl_vit.pretrain import main, parse_options
from ssl_vit.training import loop
from tests.integration.conftest import TINY, TINY_DINO

PARTS = 3


class Rounded(TorchDispatchMode):
    """Counts how often each weight is rounded to bfloat16."""

    def __init__(self, task):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in task.named_parameters()}
        self.times = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            name = self.names.get(args[0].data_ptr())
            self.times[name] += name is not None
        return out


def stepped(method, folder, *more):
    """A trainer after one step of three parts in bfloat16, and how often weights were rounded."""
    file = folder / f"{method}.yaml"
    file.write_text({"mae": TINY, "dino": TINY_DINO}[method])
    flags = ("--run.device", "cpu", "--run.precision", "bf16", "--optim.accumulate", str(PARTS))
    argv = [method, "--config", str(file), "--run.out", str(folder / "run"), *flags]
    session = build(*parse_options([*argv, "--optim.batch-size", "12", *more]))
    config = session.config
    images = TrainImages(session.images.train, session.views, config.data.channels, config.run.seed)
    batches = []
    for part in range(PARTS):
        epoch, indices = session.order.part(0, part)
        batches.append(images.__getitems__([(epoch, int(i)) for i in indices]))
    session.task.train()
    with Rounded(session.task) as seen:
        session.trainer.update(batches)
    return session.trainer, seen.times


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_a_weight_is_rounded_once_a_step(method, tmp_path, monkeypatch):
    """However many parts the step has; and the step is the one in which each part rounds anew."""
    trainer, times = stepped(method, tmp_path)
    linear = {
        f"{name}.weight" for name, m in trainer.task.named_modules() if isinstance(m, nn.Linear)
    }
    trained = {name for name, p in trainer.task.named_parameters() if p.requires_grad}
    several = {name for name, n in times.items() if name in trained & linear and n > 1}
    # Weights that are used reordered, in two parts, or in a way that autocast knows nothing of.
    known = ("patch_embed", "blocks.1.attn.qkv", "decoder.blocks.0.attn.qkv", "fc2", "last_layer")
    assert not [name for name in several if not any(part in name for part in known)]
    assert len(trained & linear & times.keys()) > 8
    monkeypatch.setattr(loop, "casts_kept", lambda device: contextlib.nullcontext())
    anew, again = stepped(method, tmp_path)
    assert sum(again.values()) > sum(times.values()) + PARTS
    for a, b in zip(trainer.trained, anew.trained, strict=True):
        assert torch.equal(a, b)


def test_checkpointed_weights_are_rounded_anew(tmp_path):
    """Their copies would lie in memory until the step is over, and outweigh what is saved."""
    _, times = stepped("mae", tmp_path)
    _, again = stepped("mae", tmp_path, "--run.activation-checkpointing")
    name = "encoder.vit.blocks.0.mlp.fc1.weight"
    assert times[name] == 1
    assert again[name] == 2 * PARTS


def test_training_goes_on_in_training_mode_after_a_look(tmp_path, monkeypatch):
    """A look at the encoder sets it to evaluation; the mode is set when it may have changed."""
    update, modes = loop.Trainer.update, []

    def noted(self, parts):
        modes.append({module.training for module in self.task.modules()})
        return update(self, parts)

    monkeypatch.setattr(loop.Trainer, "update", noted)
    file = tmp_path / "mae.yaml"
    file.write_text(TINY)
    flags = ("--run.length", "4st", "--run.probe-every", "2st", "--run.device", "cpu")
    assert main(["mae", "--config", str(file), "--run.out", str(tmp_path / "run"), *flags]) == 0
    assert (tmp_path / "run" / "panels").is_dir()
    assert modes == [{True}] * 4
