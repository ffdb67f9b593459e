"""Three teams with images of their own, from pretraining to features, by what the docs say."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.integration.conftest import Door

RUN = """
run: {length: 6st, save_every: 6st, probe_every: 3st, probe_images: 60, log_every: 3}
encoder: {arch: vit_tiny_patch16_224, image_size: [16], patch_size: 4, width: 32, depth: 2,
  heads: 2}
optim: {batch_size: 20, lr: 1.0e-3, warmup: 2st}
data: {workers: 0}
"""
MAE = RUN + "method: {decoder_width: 16, decoder_depth: 1, decoder_heads: 1}"
DINO = (
    RUN
    + "method: {prototypes: 64, head_width: 32, bottleneck: 16, local_crops: 2, local_size: [8]}"
)
FINDINGS = ("effusion", "nodule", "edema")


def said(door: Door, module: str, *arguments: str) -> str:
    """What a door says in all, its lines joined, without frames; it ends well."""
    done = door("-m", f"ssl_vit.{module}", *arguments)
    assert done.returncode == 0, done.stderr
    return " ".join((done.stdout + done.stderr).replace("│", " ").split())


def embed(door: Door, *options: str) -> None:
    said(door, "embed", "--encoder", "run", "--out", "features.npz", *options)


def xrays(folder: Path, kind: str) -> None:
    """48 images of 16 bits, four of a patient, and a CSV of patients and three findings."""
    random = np.random.default_rng(0)
    (folder / "xrays").mkdir()
    with (folder / "findings.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "patient", *FINDINGS])
        for i in range(48):
            patient, has = f"patient-{i // 4}", random.integers(0, 2, 3)
            pixels = random.normal(9000 + 9000 * has[0], 2000, (24, 20)).clip(0, 65535)
            name = f"{i:02d}.{kind}"
            if kind == "dcm":
                written = pytest.importorskip("tests.unit.data.test_dicom").written
                raw = written(pixels.astype(np.uint16), PatientID=patient)
                (folder / "xrays" / name).write_bytes(raw)
            else:
                Image.fromarray(pixels.astype(np.uint16)).save(folder / "xrays" / name)
            table.writerow([name, patient, *has])


@pytest.mark.parametrize("kind", ["dcm", "png"])
def test_x_rays_of_patients_with_findings(door, kind):
    xrays(door.folder, kind)
    (door.folder / "mae.yaml").write_text(MAE)
    data = ("--data.train", "flat:xrays", "--data.channels", "1", "--data.labels", "findings.csv")
    group = "PatientID" if kind == "dcm" else "patient"
    several = ("--data.label-column", *FINDINGS, "--data.group", group)
    run = ("mae", "--config", "mae.yaml", "--run.out", "run", "--data.preset", "medical")
    text = said(door, "pretrain", *run, *data, *several)
    assert f"11 by {group}, 1 held out: none in both" in text
    assert "medical" in text
    assert "3 labels, several an image" in text
    one = ("--data.label-column", "effusion", "--data.group", group, "--data.workers", "0")
    judged = [option for option in (*data, *one) if option not in ("--data.channels", "1")]
    text = said(door, "evaluate", "knn", "--encoder", "run", *judged, "--k", "5")
    assert "48 evaluation images of 12 groups" in text
    card = json.loads((door.folder / "run/knn.json").read_text())
    assert (card["train"]["groups"], card["scores"][0]["metrics"]["top1"]) == (12, 100.0)
    embed(door, *judged[:4], "--data.label-column", *FINDINGS)
    with np.load(door.folder / "features.npz") as found:
        assert found["cls"].shape == (48, 32)


def test_tiles_of_thirteen_bands_with_missing_pixels(door):
    """Of scenes that are large; half of one has no data at all."""
    random = np.random.default_rng(0)
    for scene in range(12):
        pixels = random.integers(500, 9000, (13, 32, 24)).astype(np.uint16)
        pixels[:, :10, :5] = 0
        pixels[:, :, 12:] *= int(scene != 3)
        place = door.folder / "scenes" / ("forest" if scene % 2 else "town")
        place.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(
            place / f"{scene}.tif",
            pixels,
            photometric="minisblack",
            planarconfig="separate",
            tile=(16, 16),
            compression="deflate",
            extratags=[(42113, 2, 0, "0", True)],
        )
    (door.folder / "mae.yaml").write_text(MAE)
    data = ("--data.train", "folder:scenes", "--data.tile", "8", "--data.workers", "0")
    run = ("mae", "--config", "mae.yaml", "--run.out", "run", "--data.preset", "aerial")
    size = ("--encoder.image-size", "8", "--encoder.patch-size", "2")
    text = said(door, "pretrain", *run, *data, *size, "--data.channels", "13")
    assert "tiles of 8 x 8 px of 12 of 12 files" in text
    assert "no data" in text
    assert "aerial" in text
    text = said(door, "evaluate", "knn", "--encoder", "run", *data, "--k", "5")
    assert "k=5" in text
    embed(door, *data)
    with np.load(door.folder / "features.npz") as found:
        names = [str(name) for name in found["names"]]
    assert names[0].endswith("scenes/forest/1.tif#r0c0")
    assert 12 * 12 - 6 <= len(names) <= 12 * 12


def test_two_channels_of_a_microscope_with_masks(door):
    random = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 6)):
        for folder in ("images", "masks"):
            (door.folder / part / folder).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((24, 24), np.uint8)
            row, column = random.integers(2, 14, 2)
            mask[row : row + 9, column : column + 9] = 1
            both = np.stack([1 + mask, 2 - mask]) * 9000.0 + random.normal(0, 900, (2, 24, 24))
            pixels = both.clip(0, 65535).astype(np.uint16)
            path = door.folder / part / "images" / f"{i}.tif"
            tifffile.imwrite(path, pixels, photometric="minisblack", metadata={"axes": "CYX"})
            Image.fromarray(mask).save(door.folder / part / "masks" / f"{i}.png")
    (door.folder / "dino.yaml").write_text(DINO)
    run = ("dino", "--config", "dino.yaml", "--run.out", "run", "--data.preset", "microscopy")
    text = said(door, "pretrain", *run, "--data.train", "flat:train/images", "--data.channels", "2")
    assert "microscopy" in text
    said(door, "report", "run")
    assert (door.folder / "run/report.html").stat().st_size > 10_000
    sets = ("--data.train", "pairs:train", "--data.val", "pairs:val", "--data.workers", "0")
    said(door, "evaluate", "segment", "--encoder", "run", *sets, "--epochs", "20")
    score = json.loads((door.folder / "run/segment.json").read_text())["scores"][0]
    assert score["metrics"]["miou"] > 55
    embed(door, "--data.train", "flat:val/images", "--features", "patches")
    with np.load(door.folder / "features.npz") as found:
        assert found["patches"].shape[0] == 6
