"""Detection as a user calls it: a score with its card, killed and resumed, two processes."""

import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ssl_vit
from ssl_vit.common.config import EncoderConfig
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.run_files import complete, read_rows
from ssl_vit.training.shards import Parts
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from tests.distributed.together import together
from tests.unit.coco_files import coco_at

# Everything that is drawn: jitter, flips, samples of anchors and proposals, stochastic depth.
OPTIONS = """
run: {length: 4st, save_every: 2st, probe_every: 2st, log_every: 1, precision: fp32}
data: {train: 'coco:train', val: 'coco:val', workers: 0}
detect: {HEAD, image_size: [64], width: 16, drop_path: 0.3, windows: 3, global_blocks: 1,
  jitter: [0.5, 1.5]}
# A low rate: AdamW's first steps turn rounding errors of tiny gradients into whole steps.
optim: {batch_size: 4, lr: 1.0e-4, warmup: 1st}
"""
HEADS = {"rcnn": "proposals: 32, detections: 10", "detr": "head: detr, queries: 7"}
KINDS = {
    "rcnn": "Mask R-CNN, 2 classes, levels at strides 4, 8, 16, 32, 64",
    "detr": "DETR, 2 classes, 7 queries of tokens at stride 8; boxes only, no masks",
}
LOSSES = {
    "rcnn": ("class", "box", "objectness", "proposal_box", "mask"),
    "detr": ("class", "box", "giou", "auxiliary"),
}
TINY = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(32,), patch_size=8, width=32, depth=2, heads=2
)
KILLER = """
import os, signal, sys
from ssl_vit.commands import cli, detecting
from ssl_vit.training import loop

real, calls = loop.Trainer.update, iter(range(1, 1000))

def update(self, parts):
    if next(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, parts)

loop.Trainer.update = update
cli.run_door(detecting.main)
"""
DOOR = ("-m", "ssl_vit.evaluate", "detect")


@pytest.fixture(scope="module", params=HEADS)
def place(shared_door, request):
    """A folder with images, an encoder, the options of a head, and a run in ``HEAD-one``."""
    folder, head = shared_door.folder, request.param
    coco_at(folder / "train", count=8, seed=0)
    coco_at(folder / "val", count=4, seed=1)
    torch.manual_seed(0)
    info = EncoderInfo(TINY, 3, (0.5,) * 3, (0.2,) * 3, "mae", 1)
    save_encoder(folder / "encoder.safetensors", Encoder(TINY, 3), info)
    (folder / f"{head}.yaml").write_text(OPTIONS.replace("HEAD", HEADS[head]))
    (folder / "killer.py").write_text(KILLER)
    result = shared_door(*DOOR, *options(head, "one"))
    assert result.returncode == 0, result.stderr
    return shared_door, result, head


def options(head, out):
    files = ("--config", f"{head}.yaml", "--encoder", "encoder.safetensors")
    return (*files, "--run.out", f"{head}-{out}")


def outcome(folder):
    """All that a finished run leaves of its training, as bytes."""
    last = complete(folder / "checkpoints")[-1]
    files = [last / "task.safetensors", last / "optimizer.safetensors"]
    return [f.read_bytes() for f in [*files, folder / "detector.safetensors"]]


def test_a_run_leaves_scores_a_card_and_pictures(place):
    door, result, head = place
    folder = door.folder / f"{head}-one"
    card = json.loads((folder / "detect.json").read_text())
    scored = [score["features"] for score in card["scores"]]
    assert scored == (["boxes"] if head == "detr" else ["boxes", "masks"])
    assert card["scores"][0]["metrics"].keys() >= {"ap", "ap50", "ap75", "ap_small"}
    assert KINDS[head].startswith(f"{card['detector']['kind']}, ")
    assert card["options"]["detect"]["head"] == head
    assert ("transformers" in card["versions"]) == (head == "detr")
    assert card["val"]["images"] == 4
    assert card["train"]["annotations_sha256"] != card["val"]["annotations_sha256"]
    assert card["step"] == 4
    assert KINDS[head] in " ".join(result.stdout.split())
    picture = np.asarray(Image.open(folder / "detections.png"))
    assert picture.shape[2] == 3
    rows = read_rows(folder / "metrics.jsonl")
    parts = [sum(r[n] for n in LOSSES[head]) for r in rows if "loss" in r]
    assert parts == pytest.approx([r["loss"] for r in rows if "loss" in r], rel=1e-5)
    probes = [r for r in rows if "val_ap" in r]
    assert [r["step"] for r in probes] == [2, 4]
    assert probes[-1]["val_ap"] == pytest.approx(card["scores"][0]["metrics"]["ap"])
    weights = load_file(folder / "detector.safetensors")
    assert "backbone.body.network.vit.blocks.0.attn.qkv.weight" in weights


def test_what_a_run_leaves_is_scored_again_and_used(place):
    """By its file, which says what head it has."""
    door, _, head = place
    result = door(*DOOR[:-1], "again", f"{head}-one/detect.json")
    assert result.returncode == 0, result.stderr
    assert "the scores are the same" in result.stdout
    model = ssl_vit.load_model(door.folder / f"{head}-one")
    image = Image.open(door.folder / "val/images/0.png")
    found, wide = model.predict([image, image.resize((128, 96))])
    assert found.keys() - {"masks"} == {"boxes", "labels", "scores"}
    assert len(found["boxes"]) == (7 if head == "detr" else len(found["scores"]))
    assert (found["boxes"] <= torch.tensor([64, 48, 64, 48])).all()
    assert wide["boxes"].max() > 64


def test_killed_and_resumed_is_bit_identical(place):
    """Also with loader processes, which draw the jitter."""
    door, _, head = place
    flags = (*options(head, "two"), "--data.workers", "1")
    killed = door("killer.py", *flags)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = door(*DOOR, *flags)
    assert again.returncode == 0, again.stderr
    assert "step 2 of 4" in again.stderr
    assert outcome(door.folder / f"{head}-two") == outcome(door.folder / f"{head}-one")


def test_two_processes_equal_one(place):
    door, _, head = place
    done = together(door, 2, *DOOR, *options(head, "both"))
    assert [d.returncode for d in done] == [0, 0], "".join(d.stderr for d in done)
    one, both = (door.folder / f"{head}-{name}" for name in ("one", "both"))
    rows = [[r for r in read_rows(f / "metrics.jsonl") if "loss" in r] for f in (one, both)]
    assert len(rows[0]) == 4
    pairs = list(zip(*rows, strict=True))
    for a, b in pairs:
        for name in ("loss", *LOSSES[head]):
            assert b[name] == pytest.approx(a[name], rel=1e-3), (a["step"], name)
    found, same = (
        Parts(sorted(complete(f / "checkpoints")[-1].glob("task*.safetensors")))
        for f in (both, one)
    )
    for name in same.names:
        torch.testing.assert_close(found.read(name), same.read(name), rtol=0, atol=2e-4, msg=name)
