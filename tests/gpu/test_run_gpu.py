"""Whole runs on CUDA by their doors: killed and gone on, scored twice, in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssl_vit.training.run_files import read_rows
from tests.conftest import ROOT
from tests.integration.conftest import KILLER, TINY, TINY_DINO

STEPS = 24
SETS = ("--data.train", "digits:train", "--data.val", "digits:val", "--data.workers", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    (made / "mae.yaml").write_text(TINY)
    (made / "dino.yaml").write_text(TINY_DINO)
    return made


def said(folder: Path, *arguments: str, status: int = 0) -> str:
    """What ``python ARGUMENTS`` prints; it ends with this status, and without a traceback."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "SSL_VIT_CACHE": str(folder / "cache")}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def pretrain(folder: Path, method: str, *more: str, door: tuple[str, ...] = ()) -> str:
    """The tiny run, to its end."""
    start = door or ("-m", "ssl_vit.pretrain")
    return said(folder, *start, method, "--config", f"{method}.yaml", *more)


def losses(folder: Path) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_a_run_killed_in_a_save_goes_on(method, folder, device, say):
    """Its curve is that of one that was never killed; joules are counted where there is NVML."""
    options = ("--run.device", device.type, "--run.precision", "fp32")
    killed = ("-c", KILLER, "mid-checkpoint", method, "--config", f"{method}.yaml", *options)
    said(folder, *killed, "--run.out", f"{method}-killed", status=-9)
    pretrain(folder, method, *options, "--run.out", f"{method}-killed")
    pretrain(folder, method, *options, "--run.out", f"{method}-whole")
    one, two = (losses(folder / f"{method}-{how}") for how in ("killed", "whole"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, STEPS + 1))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    same = all(a["loss"] == b["loss"] for a, b in zip(one, two, strict=True))
    joules = sum(row.get("energy_j", 0.0) for row in two)
    say(f"{method}: losses equal to the last digit after a kill: {same}; {joules:.0f} J")


@pytest.mark.parametrize("evaluator", [("knn",), ("linear", "--epochs", "1")], ids=lambda e: e[0])
def test_scores_repeat(evaluator, folder, device):
    """By ``again``, which refuses a score that differs; features are made anew."""
    pretrain(folder, "mae", "--run.device", device.type, "--run.out", f"run-{evaluator[0]}")
    out = f"{evaluator[0]}.json"
    options = ("--encoder", f"run-{evaluator[0]}", "--device", device.type, "--cache", "False")
    said(folder, "-m", "ssl_vit.evaluate", *evaluator, *SETS, *options, "--out", out)
    assert "the scores are the same" in said(folder, "-m", "ssl_vit.evaluate", "again", out)


def test_two_processes_are_one(folder, device):
    """By NCCL, sharded and not: the curve of one process."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU; NCCL needs two")
    options = ("--run.device", device.type, "--run.precision", "fp32")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    pretrain(folder, "dino", *options, "--run.out", "one")
    for kind in ("ddp", "fsdp"):
        more = ("--run.parallel", kind, "--run.out", kind)
        door = (*torchrun, "-m", "ssl_vit.pretrain")
        pretrain(folder, "dino", *options, *more, door=door)
        for a, b in zip(losses(folder / "one"), losses(folder / kind), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
