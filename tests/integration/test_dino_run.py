"""DINO as a user runs it: what it prints and leaves, killed and resumed, collapsed and told of."""

import json
import shutil
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ssl_vit.training.run_files import read_rows
from tests.integration.conftest import KILLER, SCORED, outcome, recount

# Half of the recipe's batch: crops are most of the work.
RUN = ("--optim.batch-size", "60", "--run.probe-every", "12st")


@pytest.fixture(scope="module")
def run(shared_door):
    """A finished tiny run: its folder and what it printed."""
    result = shared_door.quick("dino", "--run.out", "run", *SCORED, *RUN)
    assert result.returncode == 0, result.stderr
    return shared_door.folder / "run", result


def test_what_it_prints(run):
    """Views, what gray images cannot have, the health on the line of progress, the same table."""
    folder, result = run
    table = " ".join(result.stdout.replace("│", " ").split())
    assert "2 of 8x8 px + 2 of 4x4 px; for images of 1 channels and 8 bits left out:" in table
    assert "saturation, hue, grayscale" in table
    assert "teacher_entropy_share" in result.stderr
    for expected in ("raw pixels", "random encoder", "dino encoder", "attention.png"):
        assert expected in result.stdout
    scores = json.loads((folder / "results.json").read_text())["scores"]
    assert scores["dino encoder"]["knn"]["features"] == "cls"


def test_metrics(run):
    rows = read_rows(run[0] / "metrics.jsonl")
    train = [r for r in rows if "loss" in r]
    assert [r["step"] for r in train] == list(range(1, 25))
    for row in train:
        assert row["kl"] == pytest.approx(row["loss"] - row["teacher_entropy"], abs=1e-4)
        assert 0 < row["teacher_entropy_share"] <= 1
        assert 1 <= row["prototypes_used"] <= 64
    assert train[0]["center_norm"] == 0 < train[-1]["center_norm"]
    probes = [r for r in rows if "rankme" in r]
    assert [r["step"] for r in probes] == [12, 24]
    assert all(r["knn20_cls"] > 10 for r in probes)
    assert not any("warning" in r for r in rows)


def test_the_teacher_is_exported(run):
    """Not the student, which differs; with its attention as a picture."""
    folder, _ = run
    task = load_file(folder / "checkpoints" / "step-00000024" / "task.safetensors")
    encoder = load_file(folder / "encoder.safetensors")
    assert encoder
    for name, value in encoder.items():
        assert torch.equal(task[f"objectives.dino.teacher.encoder.vit.{name}"], value)
    assert not torch.equal(task["encoder.vit.cls_token"], encoder["cls_token"])
    assert Image.open(folder / "attention.png").size[0] > 200


@pytest.mark.parametrize(("moment", "resumes_at"), [("mid-epoch", 8), ("before-encoder", 8)])
def test_killed(shared_door, run, moment, resumes_at):
    """Killed while the last layer is frozen, and later: student, teacher, centre, moments equal."""
    (shared_door.folder / "killer.py").write_text(KILLER)
    options = ("dino", "--config", "tiny_dino.yaml", "--run.out", moment, *RUN)
    killed = shared_door("killer.py", moment, *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = shared_door.dino("--run.out", moment, *RUN)
    assert again.returncode == 0, again.stderr
    assert f"step {resumes_at} of 24" in again.stderr
    assert outcome(shared_door.folder / moment) == outcome(run[0])


def test_lost_moments_are_noticed(shared_door, run):
    """A checkpoint whose optimizer state lacks a tensor is refused, in one line."""
    folder = shared_door.folder / "lost"
    shutil.copytree(run[0], folder)
    path = folder / "checkpoints" / "step-00000016" / "optimizer.safetensors"
    shutil.rmtree(folder / "checkpoints" / "step-00000024")
    tensors = load_file(path)
    count = len(tensors)
    tensors.popitem()
    save_file(tensors, path)
    recount(path.parent)
    again = shared_door.dino("--run.out", "lost", *SCORED, *RUN)
    assert again.returncode == 2
    assert f"{count - 1} tensors, and {count} were written" in again.stderr.splitlines()[-1]


COLLAPSES = {
    "one prototype takes all": ("--method.center-momentum", "1.0"),
    "it is uniform": ("--method.teacher-temp", "1", "--method.teacher-temp-start", "1"),
}


@pytest.mark.parametrize("said", COLLAPSES)
def test_collapse_is_told(shared_door, said):
    """Without centring one output wins; without sharpening all are alike (section 5.3)."""
    options = ("--run.length", "70st", "--optim.lr", "5e-3", "--method.freeze-last-layer", "0st")
    options += ("--optim.batch-size", "60")
    out = f"collapse-{COLLAPSES[said][0].strip('-')}"
    result = shared_door.dino("--run.out", out, *options, *COLLAPSES[said])
    assert result.returncode == 0, result.stderr
    assert said in result.stderr
    assert "Usual remedies" in result.stderr
    warned = [r for r in read_rows(shared_door.folder / out / "metrics.jsonl") if "warning" in r]
    assert len(warned) == 1, "said once"
    assert said in warned[0]["warning"]


def test_bad_options(shared_door):
    """One line, status 2, nothing written."""
    for options, said in (
        (("--method.local-size", "5"), "--method.local-size is 5x5"),
        (("--method.momentum", "2"), "--method.momentum is 2"),
        (("--method.blur", "1", "1"), "--method.blur"),
    ):
        result = shared_door.dino("--run.out", "bad", *options)
        assert result.returncode == 2
        assert said in result.stderr.splitlines()[-1]
        assert not (shared_door.folder / "bad").exists()
