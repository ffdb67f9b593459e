"""The doors of the attentive probe, of retrieval and of copies: what they print, write, refuse."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit import commands, evaluate
from ssl_vit.commands import comparing
from ssl_vit.commands.attentive_options import AttentiveConfig
from ssl_vit.commands.compare_options import Evaluator
from ssl_vit.commands.comparing import MEASURES
from ssl_vit.commands.probe_options import PROBES
from ssl_vit.commands.probing import _RUN
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.positives import read_positives
from ssl_vit.data.sources import open_source
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import EncoderInfo, save_encoder

CONFIG = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(16,), patch_size=8, width=32, depth=2, heads=2
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the encoder file of a tiny ViT of random weights."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    info = EncoderInfo(CONFIG, 3, (0.5,) * 3, (0.25,) * 3, "mae", 3)
    save_encoder(folder / "encoder.safetensors", Encoder(CONFIG, 3), info)
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and validation folders: red or blue noise, a class of each; two of the validation
    pictures are in training, too, one mirrored."""
    root = tmp_path_factory.mktemp("sets")
    random = np.random.RandomState(0)
    for split, count in (("train", 30), ("val", 8)):
        for i in range(count):
            picture = random.randint(0, 60, (16, 16, 3)).astype(np.uint8)
            picture[..., 2 * (i % 2)] += 120
            place = root / split / ("blue" if i % 2 else "red")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place / f"{split}{i:02d}.png")
    same = root / "train" / "red" / "train04.png"
    (root / "val" / "red" / "again.png").write_bytes(same.read_bytes())
    mirrored = Image.open(root / "train" / "blue" / "train07.png")
    flip = Image.Transpose.FLIP_LEFT_RIGHT
    mirrored.transpose(flip).save(root / "val" / "blue" / "mirrored.png")
    return root / "train", root / "val"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path_factory.getbasetemp() / "feature-cache"))


def ask(name: str, run: Path | str, sets: tuple[Path, ...], out: Path, *options: str) -> dict:
    data = ["--data.train", f"folder:{sets[0]}", "--data.workers", "0"]
    data += ["--data.val", f"folder:{sets[1]}"] if len(sets) > 1 else []
    assert evaluate.main([name, "--encoder", str(run), *data, "--out", str(out), *options]) == 0
    return json.loads(out.read_text())


def test_every_evaluator_has_its_options_and_what_runs_it():
    assert PROBES.keys() == _RUN.keys()
    assert MEASURES.keys() == set(get_args(Evaluator))


def test_attentive_writes_its_protocol_and_repeats(run, sets, tmp_path, capsys):
    out = tmp_path / "attentive.json"
    made = ask("attentive", run, sets, out, "--epochs", "40", "--heads", "2", "--queries", "class")
    score = made["scores"][0]
    assert score["metrics"]["top1"] > 80
    assert (score["features"], score["details"]["tokens"]) == ("patches", 4)
    assert score["setting"].startswith("a query a class, 2 heads, lr=")
    assert {"top1", "top5"} == score["metrics"].keys()
    assert len(score["details"]["held_out_quality"]) == 5
    assert (made["train"]["images"], made["val"]["images"]) == (30, 10)
    assert made["train"]["labels_sha256"] != made["val"]["labels_sha256"]
    assert evaluate.main(["again", str(out)]) == 0
    assert "the scores are the same" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "attentive-query.png"))
    assert sheet.shape[1] == 6 * 100 + 4  # an image, three overlays and two heads
    names = [p for kind in ("blue", "red") for p in sorted((sets[1] / kind).iterdir())]
    for row, place in enumerate((0, 1, 3, 5, 6, 8)):  # six of ten
        shown = [sheet[16 + 100 * row :, 4 + 100 * x :][:96:6, :96:6] for x in (0, 4)]
        assert (shown[0] == np.asarray(Image.open(names[place]))).all()
        maps = {tuple(shown[1][y, x]) for y in (4, 12) for x in (4, 12)}
        assert {(6, 7, 12), (255, 248, 197)} <= maps  # the least and the most of four patches
    recomputed = ask(
        *("attentive", run, sets, tmp_path / "b.json", "--epochs", "40", "--heads", "2"),
        *("--queries", "class", "--cache-gb", "0"),
    )
    assert recomputed["scores"][0]["metrics"] == score["metrics"]
    assert recomputed["scores"][0]["details"]["tokens_kept"] is False


def test_attentive_refuses_what_it_cannot_do(run, sets, tmp_path):
    with pytest.raises(UserError, match="--heads is 3; it must divide the tokens' width, 32"):
        ask("attentive", run, sets, tmp_path / "a.json", "--heads", "3")
    with pytest.raises(UserError, match="raw pixels have no tokens to attend to"):
        ask("attentive", f"pixels:{run}", sets, tmp_path / "a.json")
    with pytest.raises(UserError, match="--depth is 0; it must be 1 or more"):
        ask("attentive", run, sets, tmp_path / "a.json", "--depth", "0")


def test_retrieval_ranks_training_images_for_validation_images(run, sets, tmp_path, capsys):
    out = tmp_path / "retrieval.json"
    made = ask("retrieval", run, sets, out)
    assert made["judged_on"] == "validation set against training set"
    assert [s["features"] for s in made["scores"]] == ["cls", "mean"]
    for score in made["scores"]:
        assert list(score["metrics"]) == ["map", "recall@1", "recall@5", "recall@10"]
        assert score["interval"][0] <= score["metrics"]["map"] <= score["interval"][1]
        assert score["per_class"].keys() == {"blue", "red"}
    assert evaluate.main(["again", str(out)]) == 0
    whitened = ask("retrieval", run, sets, tmp_path / "w.json", "--whitening", "True")
    assert whitened["scores"][0]["setting"] == "whitened cosine"
    assert 0 < whitened["scores"][0]["details"]["shrinkage"] <= 1
    alone = ask("retrieval", run, sets[:1], tmp_path / "alone.json", "--features", "mean")
    assert alone["judged_on"] == "leave-one-out"
    assert alone["scores"][0]["details"]["gallery"] == 30
    said = " ".join(capsys.readouterr().out.split())
    assert "map" in said
    # One validation picture is a training picture byte for byte, and every evaluator says so.
    assert made["val"]["identical_in_training"] == 1
    assert "1 OF THE IMAGES ARE IN TRAINING, TOO" in said


def test_retrieval_by_positives_needs_no_labels(run, sets, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text(
        "query,positive\nagain.png,train04.png\nmirrored.png,train07.png\n"
        "again.png,nowhere.png\nmirrored.png,train08.png\n"
    )
    flat = ["--data.train", f"flat:{sets[0]}", "--data.val", f"flat:{sets[1]}"]
    out = tmp_path / "pairs.json"
    options = ["--positives", str(file), "--out", str(out), "--data.workers", "0"]
    assert evaluate.main(["retrieval", "--encoder", str(run), *flat, *options]) == 0
    made = json.loads(out.read_text())
    assert made["positives"]["pairs"] == 3
    score = made["scores"][0]
    assert (score["details"]["queries"], score["per_class"]) == (2, {})
    assert score["metrics"]["recall@1"] >= 50  # a copy is the nearest of all
    sheet = np.asarray(Image.open(tmp_path / "pairs-nearest.png"))
    assert sheet.shape[1] == 6 * 100 + 4  # a query and five answers, of 96 pixels each
    cells = [[sheet[16 + 115 * y :, 4 + 100 * x :][:96, :96] for x in range(6)] for y in range(2)]
    right, wrong = (0, 114, 178), (230, 120, 0)
    query, first, *others = next(row for row in cells if (row[0] == row[1])[24:-4, 4:-24].all())
    assert (query[::6, ::6] == np.asarray(Image.open(sets[1] / "red" / "again.png"))).all()
    assert tuple(first[50, 0]) == right
    assert {tuple(cell[50, 0]) for cell in others} == {wrong}


def test_positives_are_found_by_name(sets, tmp_path, caplog):
    train, val = (open_source(f"flat:{path}", ReadConfig(), 3) for path in sets)
    file = tmp_path / "pairs.csv"
    file.write_text("positive;query\nred/train00;val00\ntrain02.png;val00\ntrain02;nowhere\n")
    queries, positives = read_positives(file, val, train)
    assert [Path(val.name(int(i))).stem for i in queries] == ["val00", "val00"]
    assert [Path(train.name(int(i))).stem for i in positives] == ["train00", "train02"]
    assert "1 of 3 lines name an image that is not there; the first is line 4" in caplog.text
    for text, message in (
        ("query,other\na,b\n", "has no column 'positive', but query, other"),
        ("query,positive\nx,y\n", "column query, has no line for any of 10 images"),
        ("query,positive\nval00,train00\nx,train01\nval01,y\n", None),
    ):
        file.write_text(text)
        if message is None:
            assert len(read_positives(file, val, train)[0]) == 1
            continue
        with pytest.raises(UserError, match=message):
            read_positives(file, val, train)


def test_copies_are_reported(run, sets, tmp_path, capsys):
    out = tmp_path / "copies.json"
    made = ask("copies", run, sets, out)
    score = made["scores"][0]
    assert score["metrics"] == {"copied": 20.0, "identical": 10.0}
    assert made["val"]["copies_in_training"] == 2
    assert score["details"]["better"] == "lower"
    assert "2 OF THE IMAGES HAVE COPIES IN TRAINING" in " ".join(capsys.readouterr().out.split())
    with open(tmp_path / "copies.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = [(Path(r["val"]).stem, Path(r["train"]).stem, r["identical"]) for r in rows]
    assert pairs == [("again", "train04", "1"), ("mirrored", "train07", "0")]
    assert rows[1]["orientation"] == "mirrored"
    with Image.open(tmp_path / "copies.png") as picture:
        assert picture.width > 300
    assert evaluate.main(["again", str(out)]) == 0


def test_copies_within_a_set_are_reported(run, tmp_path, capsys):
    """Without validation images; and again."""
    random = np.random.RandomState(3)
    for i in range(6):
        picture = Image.fromarray(random.randint(0, 255, (16, 16, 3)).astype(np.uint8))
        picture.save(tmp_path / f"{i}.png")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "6.png")
    out = tmp_path / "copies.json"
    options = ["--data.train", f"flat:{tmp_path}", "--data.workers", "0", "--out", str(out)]
    assert evaluate.main(["copies", "--encoder", str(run), *options]) == 0
    made = json.loads(out.read_text())
    assert made["scores"][0]["metrics"]["copied"] == pytest.approx(200 / 7)
    assert made["train"]["copies_within"] == 2
    assert "val" not in made
    said = " ".join(capsys.readouterr().out.split())
    assert "2 OF THE IMAGES HAVE COPIES AMONG THE OTHERS" in said
    with open(tmp_path / "copies.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (Path(row["image"]).stem, Path(row["copy"]).stem) == ("5", "6")
    (tmp_path / "copies.png").unlink()  # it would be one of the images
    assert evaluate.main(["again", str(out)]) == 0


def test_copies_of_too_many_images_are_doubted(run, sets, tmp_path, monkeypatch, caplog):
    ask("copies", run, sets, tmp_path / "copies.json")
    assert "too plain" not in caplog.text
    monkeypatch.setattr(commands.copies, "_MANY", 0.05)
    ask("copies", run, sets, tmp_path / "copies.json")
    assert "10 % of the images have copies that are other files" in caplog.text


def test_a_set_without_copies_is_said_to_have_none(run, sets, tmp_path, capsys):
    made = ask("copies", run, (sets[0], sets[1]), tmp_path / "c.json", "--least", "0.9999999")
    assert made["scores"][0]["metrics"]["identical"] == 10.0
    clean = tmp_path / "clean"
    clean.mkdir()
    random = np.random.RandomState(9)
    for i in range(3):
        Image.fromarray(random.randint(0, 255, (16, 16, 3)).astype(np.uint8)).save(
            clean / f"{i}.png"
        )
    out = tmp_path / "none.json"
    options = ["--data.train", f"flat:{sets[0]}", "--data.val", f"flat:{clean}", "--out", str(out)]
    assert evaluate.main(["copies", "--encoder", str(run), *options, "--data.workers", "0"]) == 0
    assert json.loads(out.read_text())["scores"][0]["metrics"]["copied"] == 0
    assert (tmp_path / "none.csv").read_text().count("\n") == 1
    assert not (tmp_path / "none.png").exists()


def test_compare_knows_attentive_and_retrieval(run, sets, tmp_path, monkeypatch):
    quick = partial(AttentiveConfig, epochs=2)
    monkeypatch.setattr(comparing, "AttentiveConfig", quick)
    data = ["--data.train", f"folder:{sets[0]}", "--data.val", f"folder:{sets[1]}"]
    entries = [f"own={run}", f"raw=pixels:{run}"]
    how = ["--evaluators", "retrieval", "attentive", "--out", str(tmp_path / "c")]
    options = [*data, "--data.workers", "0", "--encoders", *entries, *how]
    assert evaluate.main(["compare", *options]) == 0
    with open(tmp_path / "c" / "compare.csv", newline="") as file:
        rows = [(r["encoder"], r["evaluator"], r["metric"]) for r in csv.DictReader(file)]
    assert rows == [
        ("own", "retrieval", "map"),
        ("own", "attentive", "top1"),
        ("raw", "retrieval", "map"),
    ]
