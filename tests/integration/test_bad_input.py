"""A user's mistake: one clear line, exit status 2, nothing written."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.integration.conftest import recount


def refused(result, *fragments):
    """One line, no traceback, status 2."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("no --config")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in lines[0]


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--optim.lrr", "1"), ("'--optim.lrr'", "nearest known: --optim.lr", "command line")),
        (("--optim.lr", "fast"), ("--optim.lr", "fast", "command line")),
        (("--encoder.image-size", "30", "--encoder.patch-size", "4"), ("30", "patch size, 4")),
        (("--method.mask-ratio", "1.0"), ("--method.mask-ratio", "between 0 and 1")),
        (("--method.mask-ratio", "0"), ("--method.mask-ratio", "between 0 and 1")),
        (("--method.mask-ratio", "0.99"), ("--method.mask-ratio", "0 visible")),
        (("--run.length", "100"), ("--run.length", "10ep", "500st")),
        (("--encoder.arch", "vit_tny_patch16_224"), ("vit_tiny_patch16_224",)),
        (("--encoder.heads", "5"), ("--encoder.heads is 5", "32")),
        (("--optim.batch-size", "5000"), ("--optim.batch-size is 5000", "1438")),
        (("--optim.accumulate", "7"), ("--optim.batch-size is 120", "7 parts")),
        (("--data.train", "folder:empty"), ("empty", "no image")),
        (("--data.train", "folder:missing"), ("missing",)),
        (("--data.train", "diggits"), ("digits",)),
        (("--data.train", "folder:gray16", "--data.channels", "4"), ("--data.channels is 4",)),
        (("--run.device", "cuda:99"), ("cuda:99", "CUDA devices")),
        (("--run.resume", "nowhere"), ("--run.resume is 'nowhere'", "auto, never")),
        (("--config", "mae_cifar"), ("mae_cifar10",)),
        (("--data.mean", "0.5"), ("--data.mean and --data.std go together",)),
        (("--data.val", "folder:missing"), ("missing",)),
        (("--encoder.arch", "vit_base_patch16_rope_224"), ("--encoder.arch",)),
    ],
)
def test_options(door, options, fragments):
    (door.folder / "empty").mkdir()
    (door.folder / "gray16").mkdir()
    for i in range(10):
        array = np.full((9, 9), i, dtype=np.uint16)
        Image.fromarray(array).save(door.folder / "gray16" / f"{i}.png")
    refused(door.pretrain("--run.out", "run", *options), *fragments)
    assert not (door.folder / "run").exists()


def test_unknown_yaml_key_and_bad_yaml_value(door):
    (door.folder / "typo.yaml").write_text("optim: {bach_size: 3}\n")
    result = door.pretrain("--config", "typo.yaml")
    refused(result, "typo.yaml", "'optim.bach_size'", "nearest known: optim.batch_size")
    (door.folder / "value.yaml").write_text("optim: {batch_size: many}\n")
    refused(door.pretrain("--config", "value.yaml"), "value.yaml", "--optim.batch-size", "many")
    (door.folder / "torn.yaml").write_text("optim: {batch_size: [\n")
    refused(door.pretrain("--config", "torn.yaml"), "torn.yaml", "YAML")


def test_unknown_method_and_evaluator(door):
    refused(door("-m", "ssl_vit.pretrain", "mea"), "'mea'", "mae")
    refused(door("-m", "ssl_vit.pretrain"), "METHOD", "mae")
    refused(door("-m", "ssl_vit.evaluate", "kn"), "'kn'", "knn")


def test_unreadable_images_are_skipped_counted_and_named(door):
    """Truncated and garbage files among good ones: the run goes on and says which they were."""
    folder = door.folder / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(
            folder / f"{i:02d}.jpg"
        )
    whole = (folder / "07.jpg").read_bytes()
    (folder / "07.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "31.jpg").write_bytes(b"not an image")
    options = ("--data.train", "folder:images", "--data.channels", "3")
    options += ("--optim.batch-size", "20", "--run.length", "2ep")
    result = door.pretrain("--run.out", "run", *options)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("unreadable image 2 skipped") == 1
    assert "07.jpg" in result.stderr
    assert "31.jpg" in result.stderr
    strict = door.pretrain("--run.out", "strict", *options, "--data.max-bad", "0.01")
    assert strict.returncode == 2
    assert "--data.max-bad 0.01" in strict.stderr.splitlines()[-1]
    assert "Traceback" not in strict.stderr


def test_another_architectures_checkpoint(door):
    assert door.pretrain("--run.out", "run", "--run.length", "8st").returncode == 0
    path = "run/checkpoints/step-00000008"
    result = door.pretrain("--run.out", "other", "--run.resume", path, "--encoder.depth", "2")
    refused(result, "step-00000008", "missing", "encoder.vit.blocks.1")
    assert not (door.folder / "other").exists()


def test_resuming_with_other_options(door):
    assert door.pretrain("--run.out", "run", "--run.length", "8st").returncode == 0
    result = door.pretrain("--run.out", "run", "--run.length", "8st", "--optim.lr", "5e-4")
    refused(result, "--optim.lr is 0.0005", "0.001", "--run.resume never")


def test_pickle_posing_as_a_checkpoint(door):
    """It would run code when unpickled; it is named and refused."""
    bait = door.folder / "bait"

    class Bomb:
        def __reduce__(self):
            return (open, (str(bait), "w"))

    assert door.pretrain("--run.out", "run", "--run.length", "8st").returncode == 0
    checkpoint = door.folder / "run/checkpoints/step-00000008"
    torch.save({"model": Bomb()}, checkpoint / "task.safetensors")
    recount(checkpoint)
    refused(door.pretrain("--run.out", "run", "--run.length", "8st"), "pickle", "task.safetensors")
    torch.save({"model": Bomb()}, door.folder / "checkpoint.pth")
    refused(door.pretrain("--run.out", "new", "--run.resume", "checkpoint.pth"), "checkpoint.pth")
    torch.save({"model": Bomb()}, door.folder / "encoder.safetensors")
    sets = ("--data.train", "digits:train", "--data.val", "digits:val")
    result = door("-m", "ssl_vit.evaluate", "knn", "--encoder", "encoder.safetensors", *sets)
    refused(result, "pickle")
    assert not bait.exists()


def test_evaluating_what_is_not_there(door):
    sets = ("--data.train", "digits:train", "--data.val", "digits:val")
    evaluate = ("-m", "ssl_vit.evaluate", "knn")
    refused(door(*evaluate, "--encoder", "nowhere", *sets), "--encoder is 'nowhere'")
    refused(door(*evaluate, *sets), "--encoder is missing")
    refused(door(*evaluate, "--encoder", "x"), "--data.train is missing")
