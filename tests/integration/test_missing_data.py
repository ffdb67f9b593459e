"""Tiles with missing pixels, from files to what a run leaves, evaluated and shown."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from ssl_vit import evaluate, visualize
from ssl_vit.weights.exchange import load_encoder
from tests.integration.conftest import Door

SIZE = ("--encoder.image-size", "16", "--encoder.patch-size", "4", "--optim.batch-size", "8")


def tiles(door: Door, n: int = 26) -> None:
    """GeoTIFFs of four bands in two classes, a third with a declared value in a strip, a dead band;
    the last one without any data."""
    rng = np.random.default_rng(0)
    for i in range(n):
        tile = rng.normal(2000, 300, (20, 20, 4)).astype(np.float32)
        tile[..., 3] = 5
        if i % 3 == 0:
            tile[:, :9] = -9999
        tile = tile if i < n - 1 else np.full_like(tile, -9999)
        path = door.folder / "tiles" / "ab"[i % 2] / f"{i:02d}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        declared = [(42113, "s", 0, "-9999", True)]
        tifffile.imwrite(path, tile, photometric="minisblack", extratags=declared)


@pytest.fixture(scope="module")
def trained(shared_door: Door) -> Door:
    tiles(shared_door)
    made = shared_door.pretrain(
        *("--run.out", "run", "--data.train", "folder:tiles", "--data.channels", "4", *SIZE),
        *("--run.length", "12st", "--run.log-every", "1", "--run.probe-every", "6st"),
        *("--data.max-bad", "0.2", "--data.val", "folder:tiles"),
    )
    assert made.returncode == 0, made.stderr
    shared_door.said = made
    return shared_door


def test_a_run_says_what_is_missing_and_learns_the_rest(trained):
    table, said = trained.said.stdout, trained.said.stderr
    assert "no data" in table
    assert "% of the pixels of 26 images looked at (--data.nodata auto); 1 of" in table
    assert "estimated from 26 training images" in " ".join(table.replace("│", " ").split())
    assert "warning: channel 3 (the first is 0) of folder:tiles is constant, 5 in all 26" in said
    assert "25.tif: holds no data" in said
    info = load_encoder(trained.folder / "run")[1]
    assert info.mean == pytest.approx((2000, 2000, 2000, 5), rel=0.01)
    assert info.std[:3] == pytest.approx((300,) * 3, rel=0.05)
    rows = map(json.loads, (trained.folder / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 12
    assert all(0.5 < loss < 2 for loss in losses)


def test_it_is_evaluated_on_what_is_there(trained, monkeypatch):
    monkeypatch.chdir(trained.folder)
    sets = ("--data.train", "folder:tiles", "--data.val", "folder:tiles", "--data.workers", "0")
    command = ["knn", "--encoder", "run", *sets, "--k", "3", "--out", "knn.json"]
    assert evaluate.main(command) == 0
    card = json.loads((trained.folder / "knn.json").read_text())
    assert card["train"]["unreadable"] == 1


def test_missing_pixels_are_gray_where_it_is_shown(trained, monkeypatch):
    monkeypatch.chdir(trained.folder)
    command = ["reconstruction", "--encoder", "run", "--images", "tiles/a/00.tif", "--out", "a.png"]
    assert visualize.main(command) == 0
    sheet = np.asarray(Image.open(trained.folder / "a.png"))
    original = sheet[16 : 16 + 96, 4 : 4 + 96]
    assert (original[:, : 6 * 6] == 128).all()  # 7 of 16 columns, the last one at the edge
    assert (original[:, 8 * 6 :] != 128).any(-1).mean() > 0.9


def test_what_is_left_out_of_such_images_is_said(trained):
    """RandAugment, which takes 8-bit pixels, each with a value."""
    rng = np.random.default_rng(0)
    for i in range(20):
        tile = rng.integers(1, 256, (9, 9, 3), dtype=np.uint8)
        tile[: i % 4] = 0
        path = trained.folder / "eight" / "ab"[i % 2] / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        declared = [(42113, "s", 0, "0", True)]
        tifffile.imwrite(path, tile, photometric="rgb", extratags=declared)
    made = trained(
        *("-m", "ssl_vit.evaluate", "finetune", "--encoder", "none", "--run.out", "tuned"),
        *("--data.train", "folder:eight", "--optim.batch-size", "8", "--run.length", "2st"),
        *("--scratch.image-size", "8", "--scratch.patch-size", "2", "--scratch.depth", "1"),
        *("--scratch.arch", "vit_tiny_patch16_224", "--data.workers", "0"),
    )
    assert made.returncode == 0, made.stderr
    table = " ".join(made.stdout.replace("│", " ").split())
    assert "RandAugment is left out of images with missing pixels" in table
    assert "0.485, 0.456, 0.406, deviation 0.229, 0.224, 0.225: ImageNet's" in table
    assert "of the pixels of 16 images looked at" in table
