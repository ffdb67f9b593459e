"""What a run keeps to be seen: its pictures at every look, TensorBoard's projector and HPARAMS."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ssl_vit.data.sources import open_source
from ssl_vit.data.view import View
from ssl_vit.evaluators.features import Machine, extract, pooled
from ssl_vit.pictures.thumbnails import thumbnails
from ssl_vit.training.panels import drop_pictures, panel_file, panels, projections, thin_panels
from ssl_vit.training.run_files import read_rows
from ssl_vit.weights.exchange import load_encoder

# With closing scores; all held-out images are in the projector.
SCORED = ("--data.val", "digits:val", "--run.probe-images", "359")


@pytest.fixture(scope="module")
def run(shared_door):
    """A finished tiny run that looked twice, and its folder."""
    result = shared_door.pretrain("--run.out", "run", *SCORED, "--run.probe-every", "12st")
    assert result.returncode == 0, result.stderr
    return shared_door.folder / "run"


def hparams(run):
    """HPARAMS of the event files: (names and kinds, values)."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = {
        name: HParamsPluginData.FromString(content)
        for name, content in events.PluginTagToContent("hparams").items()
    }
    return found["_hparams_/experiment"].experiment, found["_hparams_/session_start_info"], events


def test_a_picture_of_each_kind_at_each_look(run):
    found = panels(run)
    assert set(found) == {"reconstruction", "pca", "neighbours"}
    for name, by_step in found.items():
        assert sorted(by_step) == [12, 24]
        newest = (run / f"{name}.png").read_bytes()
        assert newest == by_step[24].read_bytes()
        assert newest != by_step[12].read_bytes()
        assert Image.open(by_step[24]).width > 200


def test_the_projector_has_the_encoders_features(run):
    """Row by row those of the exported encoder, with labels and pictures in the same order."""
    (step,) = projections(run)
    assert step == 24
    folder = projections(run)[24]
    encoder, info = load_encoder(run)
    view = View(encoder.image_size, 1, info.mean, info.std)
    source = open_source("digits:val")
    machine = Machine(torch.device("cpu"), torch.float32, workers=0)
    expected = extract(pooled(encoder), source, view, machine)
    rows = np.loadtxt(folder / "tensors.tsv", delimiter="\t")
    np.testing.assert_allclose(rows, expected.parts["mean"].numpy(), atol=0.02)
    head, *labels = (folder / "metadata.tsv").read_text().splitlines()
    assert head == "class\timage"
    classes = expected.labels.tolist()
    assert labels == [f"{source.classes[c]}\t{i}" for i, c in enumerate(classes)]
    sheet = np.asarray(Image.open(folder / "sprite.png").convert("L")).astype(int)
    picture = thumbnails(source, [20], view, 64)[0, :, :, 0]
    row, column = divmod(20, 19)  # 359 pictures stand in 19 rows of 19
    cell = sheet[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    assert np.abs(cell - picture).max() <= 1
    config = (run / "tensorboard" / "projector_config.pbtxt").read_text()
    assert config.count("tensor_path") == 1
    assert "00024/features/tensors.tsv" in config


def test_hyperparameters_with_the_final_scores(run):
    experiment, session, events = hparams(run)
    values = session.session_start_info.hparams
    assert values["optim.lr"].number_value == 1e-3
    assert values["method.decoder_width"].number_value == 16
    assert values["encoder.image_size"].string_value == "[8]"
    scores = json.loads((run / "results.json").read_text())["scores"]["mae encoder"]
    final = {
        "final/loss": [r["loss"] for r in read_rows(run / "metrics.jsonl") if "loss" in r][-1],
        "final/knn": scores["knn"]["metrics"]["top1"],
        "final/linear": scores["linear"]["metrics"]["top1"],
    }
    assert {metric.name.tag for metric in experiment.metric_infos} == set(final)
    for name, value in final.items():
        assert events.Scalars(name)[0].value == pytest.approx(value, rel=1e-5)


def test_a_finished_run_adds_nothing(run, shared_door):
    before = sorted(path.name for path in (run / "tensorboard").iterdir())
    assert (
        shared_door.pretrain("--run.out", "run", *SCORED, "--run.probe-every", "12st").returncode
        == 0
    )
    assert sorted(path.name for path in (run / "tensorboard").iterdir()) == before


def test_pictures_are_thinned_evenly(tmp_path):
    """However many looks there are, at most 32 stay, the first and the newest among them."""
    for step in range(100, 20_100, 100):
        file = panel_file(tmp_path, "pca", step)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        thin_panels(file.parent)
        assert len(list(file.parent.iterdir())) <= 32
    left = sorted(panels(tmp_path)["pca"])
    assert (left[0], left[-1]) == (100, 20_000)
    assert len(left) > 10
    assert max(b - a for a, b in pairwise(left)) <= 2_000


def test_what_a_resumed_run_makes_again_is_dropped_first(run, tmp_path):
    """Of steps after the one that it goes on from; the others stay as they are."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    drop_pictures(copy, 24)
    assert set(projections(copy)) == {24}
    drop_pictures(copy, 12)
    assert projections(copy) == {}
    assert all(set(by_step) == {12} for by_step in panels(copy).values())
    assert len(panels(copy)) == 3


def test_without_labels_and_of_four_channels(door):
    """Places stand for labels, and no neighbour is right or wrong."""
    images = door.folder / "tiles"
    images.mkdir()
    for i in range(24):
        np.save(images / f"{i}.npy", np.random.default_rng(i).normal(size=(8, 8, 4)).astype("f4"))
    result = door.pretrain(
        *("--data.train", f"flat:{images}", "--data.holdout", "500", "--data.channels", "4"),
        *("--optim.batch-size", "8", "--run.length", "4st", "--run.probe-every", "2st"),
        *("--run.out", "run"),
    )
    assert result.returncode == 0, result.stderr
    run = door.folder / "run"
    assert {name: sorted(by) for name, by in panels(run).items()} == {
        "neighbours": [2, 4],
        "pca": [2, 4],
        "reconstruction": [2, 4],
    }
    experiment, _, _ = hparams(run)
    assert {metric.name.tag for metric in experiment.metric_infos} == {"final/loss"}
