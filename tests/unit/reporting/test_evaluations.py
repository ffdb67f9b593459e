"""Every evaluation that the doors leave in a run's folder is in its report, with its pictures."""

import json

import pytest
import torch

from ssl_vit import evaluate, report
from ssl_vit.benchmarks.scenes import open_studio, write_scenes
from ssl_vit.common.config import EncoderConfig
from ssl_vit.model.encoder import Encoder
from ssl_vit.reporting.story import read_story
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from tests.unit.run_folders import make_run, train_row, write_panel

TINY = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(32,), patch_size=8, width=32, depth=2, heads=2
)
TUNE = ("--run.length", "2st", "--optim.warmup", "1st", "--optim.batch-size", "4")
DETECT = ("--detect.image-size", "64", "--detect.width", "16", "--detect.proposals", "32")
DOORS = {
    "segment": ("pairs", "--epochs", "1"),
    "depth": ("depth", "--epochs", "1", "--scale", "0.001"),
    "copies": ("flat",),
    "retrieval": ("flat", "--data.labels", "labels.csv"),
    "attentive": ("flat", "--data.labels", "labels.csv", "--epochs", "1"),
    "finetune-pairs": ("pairs", *TUNE),
    "finetune-depth": ("depth", *TUNE, "--depth.scale", "0.001"),
    "detect": ("coco", *TUNE, *DETECT),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder after every door that leaves pictures, each with its default names."""
    folder = tmp_path_factory.mktemp("evaluated")
    lines = [f"{i:06d}.png,{'even' if i % 2 == 0 else 'odd'}" for i in range(10)]
    (folder / "labels.csv").write_text("\n".join(["name,class", *lines]))
    for part, count in (("train", 10), ("val", 4)):
        studio = open_studio("digits:val", "", 48, 3, 0)  # the first scenes are in both parts
        write_scenes(studio, count, folder / part, [str(n) for n in range(10)])
    run = make_run(folder / "run", [train_row(10)])
    write_panel(run, "pca", 10)
    (run / "pca.png").write_bytes(write_panel(run, "pca", 10).read_bytes())
    torch.manual_seed(0)
    info = EncoderInfo(TINY, 3, (0.5,) * 3, (0.2,) * 3, "mae", 10)
    save_encoder(run / "encoder.safetensors", Encoder(TINY, 3), info)
    for door, (kind, *options) in DOORS.items():
        place = "{}/images" if kind == "flat" else "{}"
        sets = [
            text
            for part in ("train", "val")
            for text in (f"--data.{part}", f"{kind}:{folder / place.format(part)}")
        ]
        name = door.partition("-")[0]
        options = [str(folder / o) if o.endswith(".csv") else o for o in options]
        sets += ["--data.workers", "0", "--encoder", str(run), *options]
        assert evaluate.main([name, *sets]) == 0
    return run


def test_every_score_and_every_picture_is_found(run):
    story = read_story(run)
    files = {str(scored.file.relative_to(run)) for scored in story.scores}
    tuned = ("finetune-pairs/finetune.json", "finetune-depth/finetune.json", "detect/detect.json")
    frozen = {f"{name}.json" for name in ("segment", "depth", "copies", "retrieval", "attentive")}
    assert files == {*frozen, *tuned}
    assert story.pictures.keys() == {
        *("pca", "segment-boundaries", "depth-maps", "copies"),
        *("retrieval-nearest", "attentive-query"),
        *("finetune-pairs/boundaries", "finetune-depth/depths", "detect/detections"),
    }
    assert story.pictures["pca"][10].parent.name == "pca", "the panel, not its copy"


def test_the_page_has_them_with_their_titles(run):
    assert report.main([str(run)]) == 0
    page = (run / "report.html").read_text()
    for kind in read_story(run).pictures:
        assert f'alt="{kind} after 10 steps" src="data:' in page
    for file in ("finetune-pairs/finetune.json", "finetune-depth/finetune.json"):
        score = json.loads((run / file).read_text())["scores"][0]
        name, value = next(iter(score["metrics"].items()))
        assert f"<td><b>{value:.2f}</b> {name}</td>" in page
        assert f"Protocol card: {file}<" in page
    for title in ("Boundaries, finetune-pairs", "Copies", "segmentation probe", "depth probe"):
        assert f">{title}<" in page
    rmse = json.loads((run / "depth.json").read_text())["scores"][0]["metrics"]["rmse"]
    assert f"rmse {rmse:.4f}" in page


def test_the_report_on_a_tuning_has_its_curves_and_pictures(run):
    """By name, and each picture once."""
    story = read_story(run / "finetune-depth")
    assert [s.file.name for s in story.scores] == ["finetune.json"]
    assert story.pictures.keys() == {"depths"}
    assert report.main([str(run / "finetune-depth")]) == 0
    page = (run / "finetune-depth" / "report.html").read_text()
    assert "Delta1 on held-out images, %" in page
    assert "Error of depths, share" in page
    assert report.main([str(run / "finetune-pairs")]) == 0
    page = (run / "finetune-pairs" / "report.html").read_text()
    assert "Mean IoU on held-out images, %" in page
    assert "Pixels of the right class, share" in page
