"""Reports on runs that tune an encoder: their own score in the head, and their own step."""

import json

import pytest

from ssl_vit.reporting.contents import score_row
from ssl_vit.reporting.story import read_story
from ssl_vit.reporting.tiles import tiles
from tests.unit.run_folders import make_run, score, train_row


def tuned(folder, name, rows, metrics=None):
    """A run of 10 steps on an encoder of step 900."""
    made = make_run(folder, rows, {"name": name})
    if metrics:
        own = score(1, 2, 4, "boxes", metrics=metrics, confusion=None)
        card = {"evaluator": name, "encoder": {"step": 900}, "step": 10, "scores": [own]}
        (made / f"{name}.json").write_text(json.dumps(card))
    return read_story(made)


def head(story):
    return {tile["label"]: (tile["value"], tile["note"]) for tile in tiles(story)}


def test_a_detection_shows_its_ap(tmp_path):
    rows = [train_row(10), {"step": 10, "val_ap": 3.21, "val_ap50": 8.0}]
    shown = head(tuned(tmp_path / "run", "detect", rows, {"ap": 3.21, "ap50": 8.0}))
    assert shown["held-out AP"] == ("3.2 %", "of boxes, IoU 0.50 to 0.95, at the last look")
    assert shown["detection"] == ("3.2 %", "AP of boxes; 95 %: 2.0 to 4.0")
    assert not shown.keys() & {"k-NN", "linear probe"}


def test_a_detection_without_a_look_yet(tmp_path):
    shown = head(tuned(tmp_path / "run", "detect", [train_row(10)]))
    assert shown["held-out score"] == ("-", "not yet measured")
    assert shown["detection"] == ("-", "measured at the end")
    assert not shown.keys() & {"k-NN", "linear probe"}


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("val_miou", "held-out mIoU"),
        ("val_delta1", "held-out delta1"),
        ("val_top1", "held-out accuracy"),
        ("val_map", "held-out precision"),
    ],
)
def test_a_fine_tuning_shows_what_it_is_judged_by(tmp_path, name, label):
    shown = head(tuned(tmp_path / "run", "finetune", [train_row(10), {"step": 10, name: 61.25}]))
    assert shown[label][0] == "61.2 %"
    assert "k-NN" not in shown


@pytest.mark.parametrize("name", ["detect", "finetune"])
def test_the_step_is_that_of_the_run(tmp_path, name):
    """In the report on the encoder's own run it is that of the encoder."""
    story = tuned(tmp_path / "mae" / name, name, [train_row(10)], {"ap": 3.2})
    assert score_row(story.scores[0], story.run.folder)["step"] == "10"
    above = read_story(make_run(tmp_path / "mae", [train_row(900)]))
    assert score_row(above.scores[0], above.run.folder)["step"] == "900"
