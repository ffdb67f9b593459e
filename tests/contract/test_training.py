"""Training any method: it learns, goes on to the bit, alike in each way to spare memory."""

import shutil
from pathlib import Path

import pytest
import torch

from ssl_vit import pretrain
from ssl_vit.commands.initial_weights import initial_method
from ssl_vit.training.run_files import complete
from tests.contract import tiny


def from_the_first_step(name: str, folder: Path, *options: str) -> tuple[Path, Path]:
    """A run of three steps, and its copy that has gone on after the first one."""
    options += ("--run.length", "3st", "--run.save-every", "1st", "--run.keep", "3")
    one, two = folder / "one", folder / "two"
    assert pretrain.main(tiny.arguments(name, *options, "--run.out", str(one))) == 0
    shutil.copytree(one, two)
    for later in complete(two / "checkpoints")[1:]:
        shutil.rmtree(later)
    assert pretrain.main(tiny.arguments(name, *options, "--run.out", str(two))) == 0
    return one, two


def outcome(folder: Path) -> dict[str, bytes]:
    """All that a run leaves of its training."""
    last = complete(folder / "checkpoints")[-1]
    files = [*last.glob("*.safetensors"), folder / "encoder.safetensors"]
    return {file.name: file.read_bytes() for file in files}


def test_its_steps_are_finite_and_move_its_weights(name, run):
    rows = tiny.losses(run)
    assert [row["step"] for row in rows] == list(range(1, tiny.STEPS + 1))
    assert all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in rows)
    first, last = tiny.state(tiny.session(name).task), tiny.weights(run)
    assert first.keys() == last.keys()
    assert not torch.equal(
        first["encoder.vit.blocks.0.mlp.fc1.weight"], last["encoder.vit.blocks.0.mlp.fc1.weight"]
    )


def test_it_goes_on_to_the_bit(name, run, tmp_path):
    """From the middle, as after a kill, with nothing left in memory."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(complete(folder / "checkpoints")[-1])
    assert pretrain.main(tiny.run_arguments(name, "--run.out", str(folder))) == 0
    assert [row["step"] for row in tiny.losses(folder)][-2:] == [tiny.STEPS - 1, tiny.STEPS]
    assert len(tiny.losses(folder)) < 2 * tiny.STEPS, "it began anew"
    assert outcome(folder) == outcome(run)


WAYS = {
    "two parts": ("--optim.accumulate", "2"),
    "activation checkpointing": ("--run.activation-checkpointing", "True"),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_trains_alike(name, way):
    """A step in two parts; blocks computed again in backward."""
    own = tiny.splitting(name) if way == "two parts" else ()
    plain, other = tiny.session(name, *own), tiny.session(name, *own, *WAYS[way])
    first = tiny.state(plain.task)
    for one, two in zip(tiny.train(plain), tiny.train(other), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    tiny.assert_same_training(first, plain.task.state_dict(), other.task.state_dict())


def test_it_begins_with_all_weights_of_a_run(name, run):
    """With another image size: positions are resampled, all else is the run's."""
    given = ("--init.encoder", str(run), "--init.heads", "True", "--encoder.image-size", "24")
    method = initial_method(*tiny.options(name, *given))
    assert method.encoder.grid == (6, 6)
    fresh = tiny.session(name, "--encoder.image-size", "24").task.state_dict()
    fixed = method.encoder.config.positions == "sincos"
    own, expected = method.state_dict(), tiny.weights(run)
    assert own.keys() == expected.keys()
    for key, value in own.items():
        if value.shape == expected[key].shape:
            assert torch.equal(value, expected[key]), key
        else:
            assert "pos_embed" in key
            assert torch.equal(value, fresh[key]) == fixed, key
            # A resized table keeps its mean, but for the edges.
            mean = expected[key].mean()
            assert fixed or (value.mean() - mean).abs() < 0.2 * expected[key].std(), key
