"""Training any method: it learns, goes on to the bit, alike in each way to spare memory."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_vit import pretrain
from ssl_vit.commands.initial_weights import initial_method
from ssl_vit.commands.pretraining import build
from ssl_vit.training.run_files import complete
from ssl_vit.training.session import prepare_folder, train
from tests.contract import tiny


def from_the_first_step(name: str, folder: Path, *options: str) -> tuple[Path, Path]:
    """A run of three steps, and its copy that has gone on after the first one.

    Without the door and its results, which are those of any run.
    """
    options += ("--run.length", "3st", "--run.save-every", "1st", "--run.keep", "3")
    config = tiny.options(name, *options, "--run.probe-images", "1")[1]
    one, two = folder / "one", folder / "two"
    for out in (one, two):
        made = build(name, replace(config, run=replace(config.run, out=str(out))))
        prepare_folder(made)
        assert made.trainer.step == (out == two)
        assert train(made) == 0
        if out == one:
            shutil.copytree(one, two)
            for later in complete(two / "checkpoints")[1:]:
                shutil.rmtree(later)
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


# Its first state, the numbers of its steps, and its last state.
Trained = tuple[dict[str, torch.Tensor], list[dict[str, float]], dict[str, Any]]
WAYS = {
    "two parts": ("--optim.accumulate", "2"),
    "activation checkpointing": ("--run.activation-checkpointing", "True"),
}


@pytest.fixture(scope="module")
def plain(name: str) -> Trained:
    """A training that is done in other ways, too."""
    made = tiny.session(name, *tiny.splitting(name))
    first = tiny.state(made.task)
    return first, tiny.train(made, 2), made.task.state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_it_trains_alike(name, plain, way):
    """A step in two parts; blocks computed again in backward. The second step shows the first
    one's update."""
    first, said, last = plain
    other = tiny.session(name, *tiny.splitting(name), *WAYS[way])
    for one, two in zip(said, tiny.train(other, 2), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    tiny.assert_same_training(first, last, other.task.state_dict())


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
