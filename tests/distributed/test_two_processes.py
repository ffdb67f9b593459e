"""Two processes on one machine agree with one process at the same global batch."""

import pytest
import torch
from safetensors.torch import load_file

from ssl_vit.training.metrics import read_rows
from tests.integration.conftest import Door


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny run by one process, by one in three parts, and by two with two parts each."""
    door = Door(tmp_path_factory.mktemp("two"))
    common = ("--run.precision", "fp32", "--optim.clip", "0.5")
    for name, extra in (("one", ()), ("parts", ("--optim.accumulate", "3"))):
        result = door.pretrain("--run.out", name, *common, *extra)
        assert result.returncode == 0, result.stderr
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    arguments = ("-m", "ssl_vit.pretrain", "mae", "--config", "tiny.yaml", "--run.out", "two")
    result = door(*torchrun, *arguments, *common, "--optim.accumulate", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("effective batch") == 1, "one process speaks"
    assert "120 = 2 processes x 2 parts x 30" in result.stdout
    return door.folder


@pytest.mark.parametrize("other", ["parts", "two"])
def test_same_losses(folder, other):
    one, many = (
        [r for r in read_rows(folder / name / "metrics.jsonl") if "loss" in r]
        for name in ("one", other)
    )
    assert len(one) == len(many) == 24
    for a, b in zip(one, many, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("other", ["parts", "two"])
def test_same_weights(folder, other):
    one, many = (load_file(folder / name / "encoder.safetensors") for name in ("one", other))
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=0, atol=2e-5, msg=name)


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """DINO's tiny run by one process, and by two, each with half of the batch in two parts."""
    door = Door(tmp_path_factory.mktemp("dino"))
    # A low rate: AdamW's first steps turn rounding errors of tiny gradients into whole steps. No
    # stochastic depth: processes draw their own.
    common = ("--config", "tiny_dino.yaml", "--run.precision", "fp32", "--optim.lr", "1e-4")
    common += ("--encoder.drop-path", "0")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    for name, launcher, parts in (("one", (), "1"), ("two", torchrun, "2")):
        arguments = ("-m", "ssl_vit.pretrain", "dino", "--run.out", name, *common)
        result = door(*launcher, *arguments, "--optim.accumulate", parts)
        assert result.returncode == 0, result.stderr
    return door.folder


def test_dino_losses(dino_folder):
    """The centre of the loss is that of the whole batch."""
    one, two = (
        [r for r in read_rows(dino_folder / name / "metrics.jsonl") if "loss" in r]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 24
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "teacher_entropy", "center_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6)


def test_dino_state(dino_folder):
    """Student, teacher and centre at the end."""
    one, two = (
        load_file(dino_folder / name / "checkpoints" / "step-00000024" / "task.safetensors")
        for name in ("one", "two")
    )
    assert one["center"].abs().max() > 1e-3
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=5e-5, msg=name)
