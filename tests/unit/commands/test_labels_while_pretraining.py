"""Labels while pretraining: k-NN on the images that have some, and a word where there is none."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_vit.commands.pretraining import Pretraining
from ssl_vit.evaluators import watch
from ssl_vit.evaluators.linear import LinearProtocol
from tests.unit.commands.test_preflight import session_of


def bright_and_dark(folder: Path, count: int) -> str:
    """Images of which every second one is bright."""
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 60, (8, 8)) + 150 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return f"flat:{folder}"


def session(folder: Path, head: str, row, *flags: str) -> Pretraining:
    """A run on 100 images, 40 others held out, labelled by one CSV: a row for each number."""
    train, val = (bright_and_dark(folder / name, n) for name, n in (("x", 100), ("y", 40)))
    path = folder / "labels.csv"
    path.write_text("\n".join([head, *(f"{i}.png,{row(i)}" for i in range(100))]))
    sets = ("--data.train", train, "--data.val", val, "--data.labels", str(path))
    return session_of("mae", folder, *sets, "--optim.batch-size", "20", *flags)


def plan(of: Pretraining) -> dict[str, str]:
    return dict(of.plan(of.about()))


@pytest.mark.parametrize(
    ("head", "row", "about"),
    [
        ("image,label", lambda i: "ab"[i % 2], "2 classes, from column label of labels.csv"),
        (
            "image,label",
            lambda i: "ab"[i % 2] if i % 10 < 2 else "",
            "2 classes, from column label of labels.csv; unknown for 80 of 100 images",
        ),
        (
            "image,bright,dark",
            lambda i: f"{i % 2},{1 - i % 2}" if i % 10 < 2 else ",",
            "2 labels, several an image, from columns bright, dark of labels.csv; unknown for 80",
        ),
    ],
)
def test_labels_of_a_csv_are_used_for_knn(tmp_path, monkeypatch, head, row, about):
    """Of images some of which have no label, those that have; health is of all."""
    # What is bright takes no thousand steps.
    monkeypatch.setattr(watch, "LinearProtocol", partial(LinearProtocol, least_steps=100))
    run = session(tmp_path, head, row)
    assert plan(run)["labels"].startswith(about)
    assert "k-NN" not in plan(run)
    numbers = run.watch.look(run.task.exported_encoder()).numbers
    assert numbers["held_out_images"] == 40
    assert numbers["knn20_mean"] > 95
    table = run.watch.compare({"pixels": lambda images: {"pixels": images.flatten(1)}})
    assert table["pixels"]["knn"].value > 95
    assert table["pixels"]["linear"].value > 95


@pytest.mark.parametrize(
    ("row", "flags", "reason"),
    [
        (lambda i: "ab"[i % 2], ("--data.val", "", "--data.holdout", "0"), "no image is held out"),
        (lambda i: "a" if i > 50 else "", (), "y labelled by .* has no labels"),
        (lambda i: "a", (), "the labels are all of one class"),
    ],
)
def test_why_there_is_no_knn_is_said_before_the_first_step(tmp_path, row, flags, reason):
    run = session(tmp_path, "image,label", row, *flags)
    assert re.match(f"not measured while training: .*{reason}", plan(run)["k-NN"])
    assert not run.watch.labelled
    assert not any(name.startswith("knn") for name in run.watch.look(run.task.encoder).numbers)


def test_without_labels_the_plan_says_why(tmp_path):
    spec = bright_and_dark(tmp_path / "x", 30).replace("flat", "folder")
    run = session_of("mae", tmp_path, "--data.train", spec, "--optim.batch-size", "20")
    assert plan(run)["labels"] == "none: there are no class folders"
    assert "k-NN" not in plan(run)
