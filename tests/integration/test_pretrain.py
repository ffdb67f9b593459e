"""A whole run: what it prints, what it leaves, and that what it leaves is of use."""

import json
import math

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssl_vit.common.config import RunConfig
from ssl_vit.common.layers import to_yaml
from ssl_vit.options.mae import MAEConfig
from ssl_vit.pretrain import parse_options
from ssl_vit.training.run_files import read_rows
from ssl_vit.weights.exchange import load_encoder, sha256
from tests.integration.conftest import SCORED


@pytest.fixture(scope="module")
def run(shared_door):
    """A finished tiny run: its folder and what it printed."""
    result = shared_door.quick("mae", "--run.out", "run", *SCORED, "--run.probe-every", "12st")
    assert result.returncode == 0, result.stderr
    return shared_door.folder / "run", result


def test_table_before_the_first_step(run):
    _, result = run
    for expected in (
        "device",
        "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32",
        "1,438 train, 359 held out",
        "120 = 1 processes x 1 parts x 120",
        "0.001",
        "24 = 2.18182 epochs x 11",
        "4 steps",
    ):
        assert expected in result.stdout
    assert result.stdout.index("warm-up") < result.stdout.index("linear")


def test_closing_words(run):
    folder, result = run
    for expected in ("raw pixels", "random encoder", "mae encoder", "k-NN k=20", "try next"):
        assert expected in result.stdout
    card = json.loads((folder / "results.json").read_text())
    scores = card["scores"]
    assert card["encoder"]["sha256"] == sha256(folder / "encoder.safetensors")
    assert (card["train"]["images"], card["val"]["images"]) == (1438, 359)
    assert card["options"]["optim"]["lr"] == 1e-3
    assert set(scores) == {"raw pixels", "random encoder", "mae encoder"}
    printed = f"{scores['mae encoder']['linear']['metrics']['top1']:.1f}"
    assert printed in result.stdout


def test_metrics_every_step_and_probes(run):
    folder, _ = run
    rows = read_rows(folder / "metrics.jsonl")
    train = [r for r in rows if "loss" in r]
    assert [r["step"] for r in train] == list(range(1, 25))
    assert all(math.isfinite(r["loss"]) and r["skipped"] == 0 for r in train)
    assert train[-1]["loss"] < 0.8 * train[0]["loss"]
    peak = max(r["lr"] for r in train)
    assert train[0]["lr"] == 0
    assert peak == pytest.approx(1e-3)
    probes = [r for r in rows if "rankme" in r]
    assert [r["step"] for r in probes] == [12, 24]
    assert all(1 <= r["rankme"] <= 32 and 0 < r["feature_std"] <= 1 for r in probes)
    assert all(r["knn20_mean"] > 10 for r in probes)


def test_tensorboard(run):
    folder, _ = run
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "probe/rankme", "probe/knn20_cls"} <= set(tags["scalars"])
    assert set(tags["images"]) == {"reconstruction", "pca", "neighbours"}
    assert len(events.Scalars("train/loss")) == 24


def test_reconstruction_picture(run):
    folder, _ = run
    with Image.open(folder / "reconstruction.png") as picture:
        assert picture.width > 3 * 96
        assert picture.height > 6 * 96


def test_config_reloads_to_an_equal_object(run):
    folder, _ = run
    _, config = parse_options(["mae", "--config", str(folder / "config.yaml")])
    assert config.run == RunConfig(
        out="run", length="24st", save_every="8st", probe_every="12st", log_every=1
    )
    assert config.method == MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=1, flip=0.0)
    assert yaml.safe_load(to_yaml(config)) == yaml.safe_load((folder / "config.yaml").read_text())


def test_encoder_loads_in_plain_timm(run):
    """The file alone, timm alone: strict, and the same features as ours."""
    folder, _ = run
    path = folder / "encoder.safetensors"
    with safe_open(path, "pt") as file:
        recipe = json.loads(file.metadata()["ssl_vit"])["timm"]
    model = timm.create_model(recipe["arch"], num_classes=0, **recipe["kwargs"]).eval()
    model.load_state_dict(load_file(path), strict=True)
    ours, info = load_encoder(folder)
    assert info.step == 24
    assert info.method == "mae"
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(images)[:, 1:], ours(images).patches, rtol=1e-4, atol=1e-5
        )


def test_checkpoints_kept(run):
    folder, _ = run
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["step-00000016", "step-00000024"]


def test_finished_run_says_so_again(run, shared_door):
    """Called again, a finished run trains nothing and prints its table."""
    folder, before = run
    stamp = (folder / "encoder.safetensors").stat().st_mtime_ns
    result = shared_door.pretrain("--run.out", "run", *SCORED, "--run.probe-every", "12st")
    assert result.returncode == 0, result.stderr
    assert "step 24 of 24" in result.stderr
    assert (folder / "encoder.safetensors").stat().st_mtime_ns == stamp
    assert result.stdout.splitlines()[-12:] == before.stdout.splitlines()[-12:]


def test_evaluate_knn_and_linear(run, shared_door):
    """The door as a user calls it; what it writes is looked at in tests/unit/test_evaluate.py."""
    folder, _ = run
    data = ("--data.train", "digits:train", "--data.val", "digits:val", "--data.workers", "0")
    for evaluator, encoder, *more in (("knn", "pixels:run"), ("linear", "run", "--epochs", "20")):
        door = ("-m", "ssl_vit.evaluate", evaluator, "--encoder", encoder, *more)
        result = shared_door(*door, *data)
        assert result.returncode == 0, result.stderr
        name = "linear.json" if encoder == "run" else "pixels-run-knn.json"
        card = json.loads((folder / name).read_text())
        best = max(s["metrics"]["top1"] for s in card["scores"])
        assert best > (95 if evaluator == "knn" else 50)
        assert f"{best:.2f}" in result.stdout
        assert card["encoder"]["method"] == "mae"
        assert len(card["encoder"]["sha256"]) == 64
        assert (card["train"]["images"], card["val"]["images"]) == (1438, 359)


def test_evaluation_repeats_to_the_last_digit(run, shared_door):
    """The number made again from its protocol is the same number."""
    folder, _ = run
    sets = ("--data.train", "digits:train", "--data.val", "digits:val")
    door = ("-m", "ssl_vit.evaluate", "linear", "--encoder", "run", "--cache", "False", *sets)
    door += ("--epochs", "10")
    scores = []
    for workers in ("0", "2"):
        out = folder / f"again{workers}.json"
        result = shared_door(*door, "--out", str(out), "--data.workers", workers)
        assert result.returncode == 0, result.stderr
        scores.append(json.loads(out.read_text())["scores"])
    assert scores[0] == scores[1]


def test_help_fits_80_columns(shared_door):
    for door in (("ssl_vit.pretrain", "mae"), ("ssl_vit.evaluate", "knn"), ("launch.slurm",)):
        result = shared_door("-m", *door, "--help")
        assert result.returncode == 0
        assert max(len(line) for line in result.stdout.splitlines()) <= 80
    result = shared_door("-m", "ssl_vit.pretrain", "--help")
    assert result.returncode == 0
    assert "mae" in result.stdout


def test_unlabelled_multichannel_images_of_any_size(door):
    """A flat folder of five-channel arrays, not square: no labels, no k-NN, a good run."""
    import numpy as np

    folder = door.folder / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        np.save(folder / f"{i:03d}.npy", rng.integers(0, 255, (20 + i, 31, 5), dtype=np.uint8))
    result = door.pretrain(
        *("--run.out", "run", "--data.train", "folder:images", "--data.holdout", "500"),
        *("--data.channels", "5", "--encoder.image-size", "12", "16", "--encoder.patch-size", "4"),
        *("--optim.batch-size", "12", "--optim.accumulate", "2", "--run.length", "3ep"),
    )
    assert result.returncode == 0, result.stderr
    assert "36 train, 4 held out" in result.stdout
    assert "linear" not in result.stdout
    _, info = load_encoder(door.folder / "run")
    assert info.channels == 5
    assert all(0.4 < m < 0.6 for m in info.mean)
    rows = read_rows(door.folder / "run" / "metrics.jsonl")
    assert any("rankme" in r for r in rows)
    assert not any("knn4_mean" in r for r in rows)


def test_nothing_held_out(door):
    """Then no score is shown: each image would find itself among its neighbours."""
    options = ("--run.length", "3st", "--data.statistics", "auto")
    result = door.pretrain("--run.out", "run", *options)
    assert result.returncode == 0, result.stderr
    assert "1,438 train, none held out" in result.stdout
    assert "linear" not in result.stdout
    assert not (door.folder / "run" / "results.json").exists()


def test_compiled_blocks(door):
    """The same training, compiled; features of another number of tokens are made in between."""
    losses = []
    for name, flag in (("plain", "False"), ("compiled", "True")):
        options = ("--run.compile", flag, "--run.precision", "fp32", "--run.probe-every", "6st")
        result = door.pretrain("--run.out", name, *options, "--run.length", "12st")
        assert result.returncode == 0, result.stderr
        rows = read_rows(door.folder / name / "metrics.jsonl")
        losses.append([r["loss"] for r in rows if "loss" in r])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_cifar_shards(door, shared_data):
    """Real images from tar shards, in a folder that may be read-only."""
    result = door.quick(
        *("mae", "--run.out", "run", "--data.channels", "3", "--run.length", "6st"),
        *("--data.train", f"tar:{shared_data}/cifar10/train-{{000000..000001}}.tar"),
        *("--data.val", f"tar:{shared_data}/cifar10/test-000000.tar"),
        *("--run.probe-images", "300", "--data.workers", "1"),
        *("--encoder.image-size", "16", "--encoder.patch-size", "4"),
    )
    assert result.returncode == 0, result.stderr
    assert "20,000 train, 10,000 held out" in result.stdout
    assert "300 held-out and" in result.stdout
