"""Fine-tuning as a user calls it: learning, stopping and going on, files, mistakes."""

import json
import signal

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ssl_vit.data.sources import open_source
from tests.integration.test_bad_input import refused

# Draws of every kind: RandAugment, erasing, mixing, stochastic depth, and an average of weights.
TUNE = """
run: {length: 24st, save_every: 8st, probe_every: 1000ep, log_every: 1}
data: {train: 'digits:train', val: 'digits:val', workers: 0}
tune: {flip: 0.0, ema: 0.9}
optim: {batch_size: 60, accumulate: 2, lr: 1.0e-3, warmup: 4st}
"""

# Without what makes it hard to learn something in a few steps.
QUICK = (
    *("--tune.mixup", "0", "--tune.cutmix", "0", "--tune.erasing", "0", "--tune.ema", "0"),
    *("--tune.randaugment", "none", "--tune.layer-decay", "0.9", "--tune.crop-scale", "0.8", "1"),
    *("--tune.drop-path", "0", "--optim.lr", "1e-2", "--run.save-every", "100ep"),
)

# Kills the process without warning at a moment that a test chooses.
KILLER = """
import os, signal, sys
from ssl_vit.commands import cli, finetuning as finetune
from ssl_vit.evaluators import classifier
from ssl_vit.training import loop

def at_call(n, real):
    calls = iter(range(1, 1000))
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    return lambda *a, **k: die() if next(calls) == n else real(*a, **k)

moment = sys.argv.pop(1)
if moment == "mid-epoch":
    real = at_call(14, loop.Trainer.update)
    loop.Trainer.update = lambda self, parts: real(self, parts)
elif moment == "before-model":
    classifier.write_own = at_call(2, classifier.write_own)
cli.run_door(finetune.main)
"""


@pytest.fixture(scope="module")
def tuning(shared_door):
    """A folder with a tiny pretrained encoder in ``run``, and the options above."""
    result = shared_door.pretrain("--run.out", "run")
    assert result.returncode == 0, result.stderr
    (shared_door.folder / "tune.yaml").write_text(TUNE)
    (shared_door.folder / "killer.py").write_text(KILLER)
    return shared_door


def finetune(door, *arguments, module=("-m", "ssl_vit.evaluate", "finetune")):
    return door(*module, "--config", "tune.yaml", "--encoder", "run", *arguments)


def outcome(folder):
    """All that a finished run leaves of its training, as bytes."""
    last = folder / "checkpoints" / "step-00000024"
    files = [last / "task.safetensors", last / "optimizer.safetensors"]
    return [f.read_bytes() for f in [*files, folder / "model.safetensors"]]


@pytest.fixture(scope="module")
def unbroken(tuning):
    result = finetune(tuning, "--run.out", "unbroken")
    assert result.returncode == 0, result.stderr
    return outcome(tuning.folder / "unbroken")


@pytest.mark.parametrize(("moment", "resumes_at"), [("mid-epoch", 8), ("before-model", 8)])
def test_killed_and_resumed_is_bit_identical(tuning, unbroken, moment, resumes_at):
    """Also with loader processes, which draw the crops and RandAugment."""
    options = ("--run.out", moment, "--data.workers", "2")
    killed = finetune(tuning, *options, module=("killer.py", moment))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = finetune(tuning, *options)
    assert again.returncode == 0, again.stderr
    assert f"step {resumes_at} of 24" in again.stderr
    assert outcome(tuning.folder / moment) == unbroken


def digits(part):
    """Images (n, 1, 8, 8) in 0..1, and labels."""
    source = open_source(f"digits:{part}")
    images = np.stack([source.read(i)[0] for i in range(len(source))])
    return torch.from_numpy(images)[:, None].float() / 255, torch.from_numpy(source.labels)


def test_learns_and_its_file_opens_in_plain_timm(tuning):
    """The score on the card is that of the file, in plain timm with the statistics it names."""
    options = ("--run.length", "6ep", "--run.probe-every", "3ep", "--run.precision", "fp32")
    result = finetune(tuning, *QUICK, *options)
    assert result.returncode == 0, result.stderr
    folder = tuning.folder / "run" / "finetune"
    card = json.loads((folder / "finetune.json").read_text())
    (score,) = card["scores"]
    assert score["metrics"]["top1"] > 30
    with safe_open(folder / "model.safetensors", "pt") as file:
        told = json.loads(file.metadata()["ssl_vit"])
    network = timm.create_model(told["timm"]["arch"], **told["timm"]["kwargs"])
    network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    about = told["about"]
    assert about["classes"] == [str(d) for d in range(10)]
    assert about["step"] == card["step"] == 6 * 23
    images, labels = digits("val")
    mean, std = (torch.tensor(about[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
    with torch.inference_mode():
        logits = network.eval()((images - mean) / std)
    share = 100 * float((logits.argmax(1) == labels).double().mean())
    assert share == pytest.approx(score["metrics"]["top1"], abs=0.3)
    # The recipe is resolved in the plan, and on the card; what was asked for wins.
    assert "layer decay 0.9" in result.stdout
    assert card["options"]["optim"]["min_lr"] == 1e-6
    assert card["options"]["data"]["channels"] == 1
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    probes = [row for row in rows if "val_top1" in row]
    assert [row["step"] for row in probes] == [69, 138]
    assert probes[-1]["val_top1"] == pytest.approx(score["metrics"]["top1"], abs=1e-3)
    assert "accuracy" in rows[0]


def test_going_on_from_the_run_folders_config(tuning, unbroken):
    """Its options are the resolved ones, so that nothing else is needed."""
    config = tuning.folder / "unbroken" / "config.yaml"
    again = tuning("-m", "ssl_vit.evaluate", "finetune", "--config", str(config))
    assert again.returncode == 0, again.stderr
    assert "step 24 of 24" in again.stderr
    assert outcome(tuning.folder / "unbroken") == unbroken
    other = tuning(
        "-m", "ssl_vit.evaluate", "finetune", "--config", str(config), "--tune.erasing", "0.5"
    )
    refused_last(other, "--tune.erasing is 0.5", "0.25")


def refused_last(result, *fragments):
    """The same as ``refused``, after the lines that say what was loaded."""
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in result.stderr
    for fragment in fragments:
        assert fragment in last, last


def test_from_scratch(tuning):
    """An architecture of its own, or that of a run, which is left as it was."""
    options = ("--config", "tune.yaml", *QUICK, "--run.length", "2st", "--data.channels", "1")
    scratch = ("--scratch.image-size", "8", "--scratch.patch-size", "2", "--scratch.depth", "1")
    result = tuning("-m", "ssl_vit.evaluate", "finetune", "--encoder", "none", *options, *scratch)
    assert result.returncode == 0, result.stderr
    card = json.loads((tuning.folder / "runs/finetune-digits/finetune.json").read_text())
    assert card["encoder"]["given"] == "none"
    assert card["options"]["tune"]["pooling"] == "cls"
    assert card["options"]["optim"]["min_lr"] == 1e-5
    result = tuning("-m", "ssl_vit.evaluate", "finetune", "--encoder", "random:run", *options)
    assert result.returncode == 0, result.stderr
    assert (tuning.folder / "run/random-finetune/model.safetensors").is_file()
    assert "random" in result.stdout


def test_another_network_of_timm(tuning):
    """A ResNet learns from colour copies of the digits, with running statistics in the average."""
    options = ("--encoder", "random:timm:resnet10t", "--config", "tune.yaml", "--run.out", "res")
    size = ("--tune.image-size", "32", "--run.length", "3st", "--tune.layer-decay", "0.9")
    result = tuning(
        "-m", "ssl_vit.evaluate", "finetune", *options, *size, "--run.precision", "fp32"
    )
    assert result.returncode == 0, result.stderr
    with safe_open(tuning.folder / "res/model.safetensors", "pt") as file:
        told = json.loads(file.metadata()["ssl_vit"])
    network = timm.create_model(told["timm"]["arch"], **told["timm"]["kwargs"])
    network.load_state_dict(load_file(tuning.folder / "res/model.safetensors"), strict=True)
    assert network.bn1.running_mean.any()


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--data.train", "flat:classes"), ("flat:classes has no labels",)),
        (("--data.val", "flat:classes"), ("flat:classes has no labels",)),
        (
            ("--data.train", "folder:one", "--data.val", ""),
            ("folder:one has no labels", "'cat' is the only folder"),
        ),
        (
            ("--data.train", "folder:classes", "--data.val", "folder:more"),
            ("'emu'", "none of them"),
        ),
        (("--data.holdout", "0", "--data.val", ""), ("--data.val is missing",)),
        (("--optim.batch-size", "30"), ("--optim.batch-size is 30", "parts of 15", "even")),
        (("--tune.image-size", "7"), ("--tune.image-size is 7", "patch size, 2")),
        (("--tune.randaugment", "augmix"), ("RandAugment is 'augmix'",)),
        (("--tune.layer-decay", "0"), ("--tune.layer-decay is 0",)),
        (("--tune.mixpu", "1"), ("--tune.mixup", "command line")),
        (("--encoder", "nowhere"), ("nowhere",)),
        (("--encoder", "pixels:run"), ("pixels", "cannot be fine-tuned")),
        (("--encoder", "none", "--scratch.image-size", "30"), ("--scratch.image-size is 30",)),
        (("--encoder", ""), ("--encoder is missing",)),
    ],
)
def test_mistakes(tuning, options, fragments):
    """One line, status 2, nothing written."""
    for folder, classes in {"one": ["cat"], "classes": "ab", "more": ["a", "b", "emu"]}.items():
        for name in classes:
            (tuning.folder / folder / name).mkdir(parents=True, exist_ok=True)
            for i in range(20):
                path = tuning.folder / folder / name / f"{i}.png"
                Image.fromarray(np.full((9, 9), i, dtype=np.uint8)).save(path)
    result = finetune(tuning, "--run.out", "wrong", "--optim.batch-size", "8", *options)
    refused_last(result, *fragments)
    assert not (tuning.folder / "wrong").exists()


def test_the_encoder_must_be_named(tuning):
    refused(
        tuning("-m", "ssl_vit.evaluate", "finetune", "--config", "tune.yaml"),
        "--encoder is missing",
    )


def test_left_out_augmentation_is_said(tuning):
    """Images of two channels have no RandAugment; the plan says so, and they are learned."""
    rng = np.random.default_rng(0)
    for name in "ab":
        (tuning.folder / "two" / name).mkdir(parents=True)
        for i in range(20):
            array = rng.integers(0, 255, (9, 9, 2), dtype=np.uint8)
            np.save(tuning.folder / "two" / name / f"{i}.npy", array)
    options = ("--encoder", "none", "--data.channels", "2", "--data.train", "folder:two")
    options += ("--data.val", "", "--optim.batch-size", "8", "--run.length", "2st")
    options += ("--scratch.image-size", "8", "--scratch.patch-size", "2", "--scratch.depth", "1")
    arguments = ("--config", "tune.yaml", "--run.out", "twos", *options)
    result = tuning("-m", "ssl_vit.evaluate", "finetune", *arguments)
    assert result.returncode == 0, result.stderr
    assert "left out: RandAugment" in " ".join(result.stdout.split())
