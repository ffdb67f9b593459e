"""Detection's options and mistakes: each told in one line, before anything is written."""

import copy
import importlib.metadata
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ssl_vit import evaluate
from ssl_vit.commands.detecting import Detection, parse_options
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.data.base import Subset
from ssl_vit.evaluators.detect import Detections, Found
from ssl_vit.evaluators.start import open_start
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.energy import Energy
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.run_files import read_rows
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from tests.unit.coco_files import coco_at, content_of, written
from tests.unit.weights import test_sam as sam

TINY = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(32,), patch_size=8, width=32, depth=2, heads=2
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detect")
    content = content_of(folder / "train", count=8)
    written(folder / "train", content)
    coco_at(folder / "val", count=3, seed=1)
    torch.manual_seed(0)
    info = EncoderInfo(TINY, 3, (0.5,) * 3, (0.2,) * 3, "mae", 1)
    save_encoder(folder / "encoder.safetensors", Encoder(TINY, 3), info)
    return folder, content


def session(folder, *more) -> Detection:
    """The run that options ask for, not yet begun; later options win."""
    return Detection(*parse_options([*arguments(folder), *more]))


def arguments(folder) -> list[str]:
    return [
        *("--encoder", str(folder / "encoder.safetensors"), "--run.out", str(folder / "out")),
        *("--data.train", f"coco:{folder / 'train'}", "--data.val", f"coco:{folder / 'val'}"),
        *("--detect.image-size", "64", "--detect.width", "8", "--optim.batch-size", "4"),
    ]


DETR = ("--detect.head", "detr")
MISTAKES = [
    (("--data.train", "digits"), "--data.train is 'digits'; objects are read from coco:ROOT"),
    (("--data.train", ""), "--data.train is missing"),
    (("--data.train", "coco:gone"), "is no folder"),
    (("--data.val", "", "--data.holdout", "0"), "--data.val is missing"),
    (("--encoder", "none"), "from scratch give random:ENCODER"),
    (("--encoder", ""), "--encoder is missing"),
    (("--detect.image-size", "60"), "--detect.image-size is 60x60; it must be divisible by"),
    (("--detect.jitter", "2", "1"), "--detect.jitter is 2 1; it must be 0 < least <= most"),
    (("--detect.windows", "-1"), "--detect.windows is -1; it must be 0 or more"),
    (("--data.cache", "x"), "--data.cache is 'x'; it has no effect on detect"),
    (("--run.parallel", "fsdp"), "detectors are not sharded"),
    (("--optim.batch-size", "9"), "--optim.batch-size is 9; coco:"),
    (("--detect.queries", "50"), "--detect.queries is 50; it has no effect on --detect.head rcnn"),
    ((*DETR, "--detect.queries", "0"), "--detect.queries is 0; it must be 1 or more"),
    ((*DETR, "--detect.proposals", "64"), "--detect.proposals is 64; it has no effect on"),
    ((*DETR, "--detect.masks", "yes"), "--detect.head detr finds boxes only: give auto"),
    ((*DETR, "--detect.width", "12"), "--detect.width is 12; --detect.head detr divides it among"),
    ((*DETR, "--detect.image-size", "60"), "--detect.image-size is 60x60; it must be divisible by"),
]


@pytest.mark.parametrize(("more", "said"), MISTAKES)
def test_mistakes_are_told_in_a_line(place, more, said):
    with pytest.raises(UserError) as error:
        session(place[0], *more)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (place[0] / "out").exists()


def test_sets_that_do_not_fit_together(place, tmp_path):
    folder, content = place
    other = copy.deepcopy(content)
    other["categories"][0]["name"] = "circle"
    (tmp_path / "annotations.json").write_text(json.dumps(other))
    spec = f"coco:{folder / 'train/images'}:{tmp_path / 'annotations.json'}"
    with pytest.raises(UserError, match=r"class 1 is 'triangle' in .* and 'circle'"):
        session(folder, "--data.val", spec)
    del other["annotations"][1]["segmentation"]
    (tmp_path / "annotations.json").write_text(
        json.dumps(other | {"categories": content["categories"]})
    )
    assert not session(folder, "--data.val", spec).masks
    with pytest.raises(UserError, match=r"some objects of .* have no segmentation"):
        session(folder, "--data.val", spec, "--detect.masks", "yes")
    empty = content | {"annotations": []}
    (tmp_path / "annotations.json").write_text(json.dumps(empty))
    with pytest.raises(UserError, match="has no object to learn from"):
        session(folder, "--data.train", spec)
    with pytest.raises(UserError, match=r"set, 8 images of coco:.*, has no object to score"):
        session(folder, "--data.val", spec)


def test_a_look_at_images_without_objects_has_no_number(place, tmp_path):
    """Of few images drawn from a validation set that has objects elsewhere."""
    folder, content = place
    other = copy.deepcopy(content)
    for one in other["annotations"]:
        one["image_id"] = 10
    (tmp_path / "annotations.json").write_text(json.dumps(other))
    spec = f"coco:{folder / 'train/images'}:{tmp_path / 'annotations.json'}"
    made = session(folder, "--data.val", spec, "--detect.masks", "no")
    val, energy = made.images.val, Energy(torch.device("cpu"))
    with RunLog(tmp_path, 0, 10, 1, 4, main=True, energy=energy) as log:
        for image in (3, 0):
            made.images = replace(made.images, val=Subset(val, np.array([image])))
            made.probe(made.task, image, log)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["step"] == 0
    assert row.keys() >= {"val_ap", "val_ap50"}


def test_a_validation_file_may_lack_the_last_classes(place, tmp_path):
    """What is found of them is wrong, and named in the picture."""
    folder, content = place
    other = copy.deepcopy(content)
    other["categories"] = [c for c in other["categories"] if c["id"] == 3]
    other["annotations"] = [a for a in other["annotations"] if a["category_id"] == 3]
    (tmp_path / "annotations.json").write_text(json.dumps(other))
    spec = f"coco:{folder / 'train/images'}:{tmp_path / 'annotations.json'}"
    made = session(folder, "--data.val", spec, "--detect.masks", "no")
    val = made.images.val
    boxes, scores = torch.tensor([[5.0, 5, 20, 30]]), torch.tensor([0.9])
    images = [Found(i, boxes, scores, torch.tensor([1])) for i in range(len(val))]
    found = Detections(images, 0)
    judged = made.tuned(made.task).scored(found, val, seed=0)
    assert judged.pictures["detections"].shape[2] == 3
    (score,) = judged.scores
    assert score.value == 0
    assert list(score.per_class) == ["square"]


@pytest.mark.parametrize(
    ("library", "extra", "more"), [("pycocotools", "detect", ()), ("transformers", "detr", DETR)]
)
def test_a_missing_library_is_told(place, monkeypatch, library, extra, more):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == library else real(name, *a),
    )
    with pytest.raises(UserError, match=rf"pip install 'ssl_vit\[{extra}\]'"):
        session(place[0], *more)


def test_a_version_of_transformers_that_is_too_old_is_told(place, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.0.1")
    said = r"detr needs transformers 5\.1 or later: .*'ssl_vit\[detr\]' \(there is 5\.0\.1\)"
    with pytest.raises(UserError, match=said):
        session(place[0], *DETR)


def test_images_have_the_encoders_channels_unless_others_are_asked_for(place, tmp_path):
    """Others' filters are adapted, as in fine-tuning."""
    folder = place[0]
    torch.manual_seed(0)
    info = EncoderInfo(TINY, 1, (0.5,), (0.2,), "mae", 1)
    save_encoder(tmp_path / "gray.safetensors", Encoder(TINY, 1), info)
    gray = ("--encoder", str(tmp_path / "gray.safetensors"))
    made = session(folder, *gray)
    assert made.config.data.channels == 1
    batch = made.training_images().__getitems__([(0, 0)])
    assert batch.views.crops[0].shape == (1, 1, 64, 64)
    colour = session(folder, *gray, "--data.channels", "3")
    assert colour.task.backbone.body.network.channels == 3
    assert len(colour.images.mean) == 3


OTHERS = {
    "resnet18": ("random:timm:resnet18", "conv1"),
    "swin": ("random:timm:swin_tiny_patch4_window7_224", "patch_embed.proj"),
    "sam": ("random:sam.pth", "patch_embed.proj"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_networks_are_trained_and_scored(place, tmp_path, monkeypatch, kind):
    """With stages, and SAM's encoder, of one stride: from the first weights on, but BatchNorm."""
    monkeypatch.chdir(tmp_path)
    torch.save(sam.official(sam.network().state_dict()), "sam.pth")
    encoder, first = OTHERS[kind]
    options = ("--encoder", encoder, "--run.out", "out", "--run.length", "2st")
    heads = ("--detect.proposals", "8", "--detect.detections", "5")
    quick = ("--optim.warmup", "1st", "--data.workers", "0", *heads)
    assert evaluate.main(["detect", *arguments(place[0]), *options, *quick]) == 0
    card = json.loads((tmp_path / "out/detect.json").read_text())
    assert card["step"] == 2
    assert [score["features"] for score in card["scores"]] == ["boxes", "masks"]
    assert all(0 <= score["metrics"]["ap"] <= 100 for score in card["scores"])
    assert card["detector"]["strides"] == [4, 8, 16, 32, 64]
    before = open_start(encoder, EncoderConfig(), 3, 0).module.state_dict()
    after = load_file(tmp_path / "out/detector.safetensors")
    own = "backbone.body.network."
    moved = {n for n, v in before.items() if not torch.equal(v, after[f"{own}{n}"])}
    assert f"{first}.weight" in moved
    assert not any("bn" in name for name in moved)


def test_images_that_are_enlarged_much_are_told(place):
    """They cost as much as large ones, and 1,024 pixels are the default."""
    (said,) = session(place[0], "--detect.image-size", "256").images.warnings
    assert "train are around 48x64 pixels, and are enlarged to 256x256, which costs time" in said
    assert session(place[0], "--detect.image-size", "248").images.warnings == ()


def test_the_plan_names_detector_encoder_and_objects(place):
    windows = ("--detect.windows", "4", "--detect.global-blocks", "1")
    made = session(place[0], "--detect.frozen", "True", *windows)
    rows = dict(made.about())
    assert rows["detector"] == "Mask R-CNN, 2 classes, levels at strides 4, 8, 16, 32, 64"
    assert rows["encoder"].endswith("encoder.safetensors, windows of 4 patches")
    assert rows["trained"] == "pyramid and heads; the encoder is frozen"
    assert rows["objects"] == "16 in training"
    assert made.images.mean == (0.5,) * 3  # the encoder's own
    assert made.describe_views() == "1 of 64x64 px, large-scale jitter 0.1 to 2"
    other = session(place[0], *DETR, "--detect.frozen", "True", *windows)
    rows = dict(other.about())
    said = "DETR, 2 classes, 100 queries of tokens at stride 8; boxes only, no masks"
    assert rows["detector"] == said
    assert rows["trained"] == "decoder and heads; the encoder is frozen"
    assert not other.training_images().masks
    assert other.images.warnings == ()


def test_images_with_more_objects_than_queries_are_told(place):
    (said,) = session(place[0], *DETR, "--detect.queries", "1").images.warnings
    assert "train has 2 objects, more than --detect.queries, 1: those that are left over" in said
