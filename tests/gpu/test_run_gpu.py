"""Whole runs on CUDA by their doors: killed and gone on, beside the CPU's, scored twice, too large,
in two processes.

Runs that do not wait for each other go side by side.
"""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_vit.training.energy import Energy
from ssl_vit.training.run_files import read_rows
from tests.gpu.conftest import surroundings
from tests.integration.conftest import KILLER, TINY, TINY_DINO
from tests.pairs import write_pairs

STEPS = 24
SETS = ("--data.train", "digits:train", "--data.val", "digits:val", "--data.workers", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    (made / "mae.yaml").write_text(TINY)
    (made / "dino.yaml").write_text(TINY_DINO)
    write_pairs(made / "pairs")
    return made


def together(*calls: Callable[[], object]) -> None:
    """Do all of these side by side."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()


def said(folder: Path, *arguments: str, status: int = 0) -> str:
    """What ``python ARGUMENTS`` prints; it ends with this status, and without a traceback."""
    env = surroundings(SSL_VIT_CACHE=str(folder / "cache"))
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
    """Its curve is that of one that was never killed."""
    options = ("--run.device", device.type, "--run.precision", "fp32")
    killed = ("-c", KILLER, "mid-checkpoint", method, "--config", f"{method}.yaml", *options)

    def killed_and_gone_on() -> None:
        said(folder, *killed, "--run.out", f"{method}-killed", status=-9)
        pretrain(folder, method, *options, "--run.out", f"{method}-killed")

    together(
        killed_and_gone_on,
        lambda: pretrain(folder, method, *options, "--run.out", f"{method}-whole"),
    )
    one, two = (losses(folder / f"{method}-{how}") for how in ("killed", "whole"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, STEPS + 1))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    same = all(a["loss"] == b["loss"] for a, b in zip(one, two, strict=True))
    say(f"{method}: losses equal to the last digit after a kill: {same}")
    if device.type == "cuda":
        assert sum(row["energy_j"] for row in two) > 0


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_a_curve_is_the_cpus(method, folder, device, say):
    """Of 200 steps by the recipe for digits, in means of 20; a smaller DINO would be chaotic."""
    length = ("--run.length", "200st", "--run.save-every", "200st", "--run.probe-every", "1000ep")
    options = (*length, "--run.log-every", "1", "--data.val", "", "--data.holdout", "0")
    recipe = ("--config", f"{method}_digits", "--run.precision", "fp32")
    names = {f"{method}-there": device.type, f"{method}-here": "cpu"}

    def run(out: str) -> None:
        door = ("-m", "ssl_vit.pretrain", method, *recipe, *options)
        said(folder, *door, "--run.device", names[out], "--run.out", out)

    together(*(lambda out=out: run(out) for out in names))
    curves = [np.array([row["loss"] for row in losses(folder / out)]) for out in names]
    there, here = (curve.reshape(10, 20).mean(1) for curve in curves)
    say(f"{method}: loss after 200 steps {there[-1]:.5f}, on the CPU {here[-1]:.5f}; at most")
    say(f"  {abs(there / here - 1).max():.2e} apart in means of 20 steps")
    assert np.ptp(here) > 0.05 * here.mean()  # DINO's rises at first
    np.testing.assert_allclose(there, here, rtol=0.02)


def test_scores_repeat(folder, device):
    """By ``again``, which refuses a score that differs; features are made anew."""
    pretrain(folder, "mae", "--run.device", device.type, "--run.out", "scored")
    pairs = ("--data.train", "pairs:pairs", "--data.val", "pairs:pairs", "--data.workers", "2")
    calls = {
        "knn": ("knn", *SETS, "--cache", "False"),
        "linear": ("linear", *SETS, "--cache", "False", "--epochs", "1"),
        "segment": ("segment", *pairs, "--size", "16"),
    }

    def twice(name: str) -> None:
        options = ("--encoder", "scored", "--device", device.type, "--out", f"{name}.json")
        said(folder, "-m", "ssl_vit.evaluate", *calls[name], *options)
        again = said(folder, "-m", "ssl_vit.evaluate", "again", f"{name}.json")
        assert "the scores are the same" in again, name

    together(*(lambda name=name: twice(name) for name in calls))


def test_joules_are_counted(device, tmp_path, say):
    """By the GPU's own counter."""
    if device.type != "cuda":
        pytest.skip("of CUDA")
    energy, work = Energy(device, powercap=tmp_path), torch.randn(4096, 4096, device=device)
    for _ in range(200):
        work = torch.nn.functional.normalize(work @ work)
    torch.cuda.synchronize()
    joules = energy.take()
    say(f"200 products of 4096 x 4096 in float32: {joules:.0f} J")
    assert joules > 0


def test_a_batch_too_large_is_one_line(folder, device):
    """By the door of a run; no memory holds 1,024 images of 1,024 patches in a ViT-L."""
    if device.type != "cuda":
        pytest.skip("of CUDA: a host would take all its memory")
    size = ("--encoder.width", "1024", "--encoder.depth", "24", "--encoder.heads", "16")
    size += ("--encoder.image-size", "64", "--optim.batch-size", "1024", "--data.workers", "8")
    door = ("-m", "ssl_vit.pretrain", "dino", "--config", "dino.yaml", *size)
    lines = said(folder, *door, "--run.device", "cuda", "--run.out", "large", status=1).splitlines()
    (last,) = (line for line in lines if line.startswith("stopped: "))
    assert "out of memory" in last
    assert "--optim.accumulate" in last


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
