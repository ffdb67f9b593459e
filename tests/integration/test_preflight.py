"""The dry run as a user calls it: what it prints, that it writes nothing, several processes."""

import re
from pathlib import Path

import pytest

from ssl_vit.benchmarks import trial
from ssl_vit.common.errors import UserError
from ssl_vit.pretrain import main


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to call doors in, without long measurements."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "_LOADER_SECONDS", 0.1)
    return tmp_path


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_the_first_run_looks_right_and_nothing_is_written(method, here, capsys):
    assert main([method, "--dry-run", "--data.workers", "1"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "effective batch │ 64 = 1 processes x 1 parts x 64",
        "learning rate",
        "GFLOP an image",
        "optimizer's moments",
        "activations",
        "bound by",
        "time to finish",
        "begins          │ anew",
        "no problems found",
    ):
        assert expected in printed
    assert "warning" not in printed
    assert list(here.iterdir()) == []


def test_it_says_where_a_run_would_go_on(here, door, capsys):
    """Of a run that is there it leaves every byte; what the run would refuse, it refuses."""
    short = ("--run.out", "run", "--run.length", "8st")
    assert door.pretrain(*short).returncode == 0
    tiny = ["mae", "--config", "tiny.yaml", *short]
    files = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    assert main([*tiny, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "after step 8, from run/checkpoints/step-00000008" in printed
    assert "0:00 for 0 steps" in printed
    with pytest.raises(UserError, match=r"--run.seed is 7"):
        main([*tiny, "--dry-run", "--run.seed", "7"])
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == files
    assert "dry_run" not in (here / "run" / "config.yaml").read_text()


def memory(printed: str) -> dict[str, float]:
    """MiB by part, from the table."""
    return {name: float(n) for name, n in re.findall(r"│ (\w+) +│ ([\d.]+) MiB", printed)}


def test_several_processes_measure_and_one_speaks(here, door, capsys):
    """Sharded over two, each holds half of weights and gradients; weights that are gathered for a
    block are no activations."""
    tiny = ["dino", "--config", "tiny_dino.yaml", "--dry-run", "--run.precision", "fp32"]
    tiny += ["--run.device", "cpu", "--method.head-width", "512"]
    before = set(here.rglob("*"))
    result = door(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "ssl_vit.pretrain", *tiny, "--run.parallel", "fsdp", "--optim.accumulate", "2"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("dry run: nothing is written") == 1
    assert "120 = 2 sharded processes x 2 parts x 30" in result.stdout
    assert "warning: --optim.accumulate 2" in result.stdout
    assert set(here.rglob("*")) == before
    assert main([*tiny, "--optim.accumulate", "4"]) == 0  # as many images at once
    sharded, alone = memory(result.stdout), memory(capsys.readouterr().out)
    for part in ("weights", "gradients"):
        assert sharded[part] == pytest.approx(alone[part] / 2, rel=0.05)
    assert sharded["activations"] == alone["activations"]
