"""Two processes, sharded or not, agree with one process at the same global batch."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from ssl_vit.training.run_files import complete, read_rows
from ssl_vit.training.shards import Parts
from tests.distributed.together import together
from tests.integration.conftest import Door

# Enough for three checkpoints; the last layer of DINO's head is frozen up to their middle.
STEPS, LATER = 12, 8
LAST, MIDDLE = f"step-{STEPS:08d}", f"step-{LATER:08d}"
# Nothing held out, so that no time goes into scores.
COMMON = ("--run.precision", "fp32", "--data.val", "", "--data.holdout", "0", "--optim.spike", "6")
COMMON += ("--run.keep", "1", "--run.keep-every", "4st", "--optim.batch-size", "48")
COMMON += ("--run.length", f"{STEPS}st", "--run.save-every", "4st")
MAE = ("mae", "--config", "tiny.yaml", "--optim.clip", "0.5")
# A low rate: AdamW's first steps turn rounding errors of tiny gradients into whole steps.
DINO = ("dino", "--config", "tiny_dino.yaml", "--optim.lr", "1e-4", "--encoder.drop-path", "0.3")
DINO += ("--optim.name", "muon", "--method.freeze-last-layer", "6st")
FSDP = ("--run.parallel", "fsdp")
RUNS = {
    "mae-one": (1, *MAE),
    "mae-parts": (1, *MAE, "--optim.accumulate", "3"),
    "mae-two": (2, *MAE, "--optim.accumulate", "2"),
    "mae-sharded": (2, *MAE, *FSDP),
    "dino-one": (1, *DINO),
    "dino-two": (2, *DINO, "--optim.accumulate", "2"),
    "dino-sharded": (2, *DINO, *FSDP, "--optim.accumulate", "2", "--run.activation-checkpointing"),
}
OTHERS = [name for name in RUNS if not name.endswith("-one")]


def pretrain(door: Door, world: int, *arguments: str) -> list:
    """The door, in so many processes, without a failure."""
    done = together(door, world, "-m", "ssl_vit.pretrain", *arguments, *COMMON)
    assert [d.returncode for d in done] == [0] * world, [d.stderr for d in done]
    return done


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """Each of the runs."""
    door = Door(tmp_path_factory.mktemp("two"))
    for name, (world, *arguments) in RUNS.items():
        said = pretrain(door, world, *arguments, "--run.out", name)
        assert [s.stdout.count("effective batch") for s in said] == [1] + [0] * (world - 1)
        if name == "mae-two":
            assert "48 = 2 processes x 2 parts x 12" in said[0].stdout
        if name == "mae-sharded":
            assert "48 = 2 sharded processes x 1 parts x 24" in said[0].stdout
    return door


def losses(folder):
    return [r for r in read_rows(folder / "metrics.jsonl") if "loss" in r]


def task_of(checkpoint) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint, its parts put together."""
    parts = Parts(sorted(checkpoint.glob("task*.safetensors")))
    return {name: parts.read(name) for name in parts.names}


@pytest.mark.parametrize("other", OTHERS)
def test_same_losses(door, other):
    """The centre of DINO's loss is that of the whole batch; stochastic depth drops the same."""
    one, many = (losses(door.folder / n) for n in (f"{other.split('-')[0]}-one", other))
    assert len(one) == len(many) == STEPS
    names = ("loss", "teacher_entropy", "center_norm") if "dino" in other else ("loss",)
    for a, b in zip(one, many, strict=True):
        for name in names:
            assert b[name] == pytest.approx(a[name], rel=1e-4 if "dino" in other else 1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("other", OTHERS)
def test_same_weights(door, other):
    """Student, teacher and centre too."""
    one = task_of(door.folder / f"{other.split('-')[0]}-one" / "checkpoints" / LAST)
    many = task_of(door.folder / other / "checkpoints" / LAST)
    assert one.keys() == many.keys()
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=0, atol=5e-5, msg=name)
    exported = load_file(door.folder / other / "encoder.safetensors")
    inner = "objectives.dino.teacher.encoder" if "dino" in other else "encoder"
    for name, value in exported.items():
        assert torch.equal(value, many[f"{inner}.vit.{name}"]), name


def test_each_process_writes_half(door):
    """Also where each holds all; the files of both ways to share the work are alike."""
    for name in ("mae-two", "mae-sharded"):
        folder = door.folder / name / "checkpoints" / MIDDLE
        halves = [load_file(folder / f"task-0000{r}-of-00002.safetensors") for r in (1, 2)]
        weight = "encoder.vit.blocks.0.mlp.fc1.weight"
        assert [half[weight].shape for half in halves] == [(64, 32), (64, 32)]
        assert halves[0]["encoder.vit.cls_token"].shape == (1, 1, 32)
        assert halves[1]["encoder.vit.cls_token"].shape == (0, 1, 32)


def test_the_guard_against_spikes_is_part_of_the_state(door):
    """Its mean is that of the losses so far, in every world, and it goes on from there."""
    for name in ("mae-one", "mae-two", "mae-sharded"):
        folder = door.folder / name / "checkpoints" / MIDDLE
        parts = Parts(sorted(folder.glob("optimizer*.safetensors")))
        seen = [row["loss"] for row in losses(door.folder / name)]
        assert parts.read("::losses") == LATER
        mean = parts.read("::loss_mean").item()
        assert mean == pytest.approx(sum(seen[:LATER]) / LATER, rel=1e-5)


def test_slow_processes_are_seen(door):
    """Each process's own seconds are in the metrics, and the slowest's."""
    rows = read_rows(door.folder / "mae-two" / "metrics.jsonl")
    seconds = [row["process_s"] for row in rows if "process_s" in row]
    assert len(seconds) == STEPS
    assert all(len(row) == 2 and min(row) > 0 for row in seconds)
    for row, own in zip(losses(door.folder / "mae-two"), seconds, strict=True):
        assert row["slowest_s"] == pytest.approx(max(own), rel=1e-3)


@pytest.mark.parametrize(
    ("before", "world", "how"),
    [("mae-two", 1, ()), ("mae-two", 2, FSDP), ("dino-sharded", 2, ())],
    ids=["two to one", "two to sharded", "sharded to two"],
)
def test_another_world_goes_on(door, before, world, how):
    """From step 8 to the end with other processes: the same losses, the same weights."""
    method = before.split("-")[0]
    out = f"{before}-{world}{''.join(how)}"
    shutil.copytree(door.folder / before, door.folder / out)
    shutil.rmtree(complete(door.folder / out / "checkpoints")[-1])
    options = MAE if method == "mae" else DINO
    said = pretrain(door, world, *options, *how, "--run.out", out)
    assert f"step {LATER} of {STEPS}" in said[0].stderr
    one, many = (losses(door.folder / n)[LATER:] for n in (f"{method}-one", out))
    for a, b in zip(one, many, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    last = f"checkpoints/{LAST}"
    before, after = task_of(door.folder / before / last), task_of(door.folder / out / last)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=5e-5, msg=name)


RESAVED = """
import sys
from pathlib import Path
from ssl_vit import pretrain
from ssl_vit.commands import pretraining as session
from ssl_vit.training.checkpoint import Checkpoints
from ssl_vit.training.resume import load_into

def carried(options, found, out):
    made = session.build(*pretrain.parse_options(options))
    load_into(made.trainer, Path(found))
    checkpoints = Checkpoints(Path(out), 9, 0, made.parallel)
    state = made.trainer.guard.state
    checkpoints.save(made.trainer.step, made.task, made.trainer.optimizer, {}, extra=state)
    checkpoints.finish()
    return f"{out}/step-00000008"

for method in ("mae", "dino"):
    options = sys.argv[sys.argv.index(method) : sys.argv.index(method + "!")]
    found = f"{method}-two/checkpoints/step-00000008"
    for i, how in enumerate(("fsdp", "ddp", "fsdp")):
        found = carried([*options, "--run.parallel", how], found, f"carried-{method}-{i}")
"""


def test_state_is_the_same_bits_in_every_world(door):
    """Two processes -> sharded -> two -> sharded -> one: weights, moments, step counts, centre."""
    (door.folder / "resaved.py").write_text(RESAVED)
    both = (*MAE, *COMMON, "mae!", *DINO, *COMMON, "dino!")
    for done in together(door, 2, "resaved.py", *both):
        assert done.returncode == 0, done.stderr
    for method in ("mae", "dino"):
        paths = [door.folder / f"{method}-two" / "checkpoints"]
        paths += [door.folder / f"carried-{method}-{i}" for i in range(3)]
        for kind in ("task", "optimizer"):
            files = [sorted((p / MIDDLE).glob(f"{kind}-*")) for p in paths]
            states = [[f.read_bytes() for f in found] for found in files]
            assert len(states[0]) == 2
            assert states[0] == states[1] == states[2] == states[3], kind
