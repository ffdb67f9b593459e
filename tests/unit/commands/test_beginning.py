"""Going on from given weights: the first look, the warning, the best encoder beside the last."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from ssl_vit import pretrain
from ssl_vit.commands.beginning import SELECTION, Looks, verdict
from ssl_vit.evaluators import watch
from ssl_vit.evaluators.backbone import open_backbone
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.linear import LinearProtocol
from ssl_vit.evaluators.watch import Look
from ssl_vit.reporting.page import _levels
from ssl_vit.reporting.story import read_story
from ssl_vit.training.run_files import complete, read_rows
from ssl_vit.weights.exchange import EncoderInfo, load_encoder, read_info, save_encoder
from ssl_vit.weights.own_files import BEST_FILE
from tests.contract import tiny

NONE = FeatureSet({}, torch.zeros(0), 0, torch.zeros(0, dtype=torch.int64))


def look(knn: float, selection: float) -> Look:
    return Look({"knn20_cls": knn, "knn20_mean": 9.0}, NONE, knn - 2, selection)


def told(*values: float) -> list[str]:
    """What is said at each look, of this k-NN, 10 steps apart; the start's interval is 2 below."""
    looks, said = Looks([]), []
    for i, value in enumerate(values):
        looks.add(10 * i, look(value, value))
        said.append(looks.news())
    return said


def test_falling_below_the_starts_interval_is_a_warning_once():
    said = told(50.0, 48.5, 47.9, 40.0, 49.0, 60.0, 30.0)
    assert [bool(line) for line in said] == [False, False, True, False, True, False, True]
    assert said[2].startswith("step 20: k-NN is 47.9 %, below the 50.0 % (95 % from 48.0)")
    assert "--optim.encoder-lr" in said[2]
    assert BEST_FILE in said[2]
    assert said[4] == "step 40: no longer: k-NN below the start's"


def test_the_best_is_by_the_training_images_and_the_first_of_equal_ones(tmp_path):
    looks = Looks([])
    for step, knn, selection in (
        (0, 50.0, 40.0),
        (10, 60.0, 45.0),
        (20, 70.0, 45.0),
        (30, 9.0, 44.0),
    ):
        looks.add(step, look(knn, selection))
    assert looks.best["step"] == 10
    assert verdict(looks, 30, tmp_path, "k-NN of 70 images") == (
        "the best encoder is that of step 10, by k-NN of 70 images: 45.0 %, "
        f"the last has 44.0 %: use --encoder {tmp_path / BEST_FILE}"
    )
    looks.add(40, look(10.0, 46.0))
    assert verdict(looks, 40, tmp_path, "").startswith("the last encoder is the best")
    looks.add(50, look(70.0, 46.0))
    said = verdict(looks, 50, tmp_path, "k-NN")
    assert said == "the last encoder is as good as that of step 40, by k-NN: 46.0 %"
    assert Looks([]).best is None
    assert verdict(Looks([]), 40, tmp_path, "") == ""


@pytest.fixture(scope="module", params=[("mae", "500"), ("dino", "0")], ids=["mae", "dino"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A finished run from a file's weights, that looked every step; its options and folder. One
    chooses the best by images held out for that, the other by training images."""
    name, holdout = request.param
    folder = tmp_path_factory.mktemp(name)
    start = tiny.session(name).task.exported_encoder()
    torch.manual_seed(3)
    for p in (p for p in start.parameters() if p.requires_grad):
        torch.nn.init.normal_(p, std=0.1)
    save_encoder(folder / "start.safetensors", start, EncoderInfo(start.config, 1, (0.3,), (0.4,)))
    options = tiny.arguments(
        *(name, "--init.encoder", str(folder / "start.safetensors"), "--data.holdout", holdout),
        *("--data.val", "digits:val", "--run.probe-images", "60", "--run.probe-every", "1st"),
        *("--run.save-every", "1st", "--run.keep", "9", "--optim.lr", "3e-2"),
        *("--optim.freeze-encoder", "1st", "--optim.release", "0st", "--optim.encoder-lr", "1"),
    )
    with pytest.MonkeyPatch.context() as patch:
        # Closing scores are there, and how good they are is told nowhere.
        patch.setattr(watch, "LinearProtocol", partial(LinearProtocol, least_steps=20))
        assert pretrain.main([*options, "--run.out", str(folder / "run")]) == 0
    return options, folder / "run"


def probes(folder: Path) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.jsonl") if SELECTION in row]


def test_the_first_look_is_at_the_start_and_frozen_steps_keep_it(run):
    _, folder = run
    rows = probes(folder)
    assert [row["step"] for row in rows] == list(range(tiny.STEPS + 1))
    kinds = ("feature_std", "rankme", SELECTION)
    assert all(rows[0][kind] == rows[1][kind] for kind in kinds), "the encoder was frozen"
    assert any(rows[0][kind] != rows[-1][kind] for kind in kinds)


def test_the_best_encoder_is_the_one_of_its_look_and_opens(run):
    _, folder = run
    rows = probes(folder)
    best = max(rows, key=lambda row: row[SELECTION])
    file = folder / BEST_FILE
    assert read_info(file).step == best["step"]
    assert open_backbone(str(file), 0).view.channels == 1
    mine, start = load_encoder(file)[0], load_encoder(folder.parent / "start.safetensors")[0]
    same = all(map(torch.equal, mine.parameters(), start.parameters()))
    assert same == (best["step"] <= 1)  # the first step is a frozen one
    scores = json.loads((folder / "results.json").read_text())["scores"]
    assert "initial encoder" in scores
    named = [name for name in scores if name.startswith("best encoder")]
    assert bool(named) == (0 < best["step"] < tiny.STEPS)


@pytest.mark.parametrize("step", [1, 3])
def test_it_goes_on_with_the_same_looks_and_the_same_best(run, tmp_path, step):
    """Killed after a save and before its look, which is then made before the next step."""
    options, folder = run
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    for later in complete(again / "checkpoints")[step:]:
        shutil.rmtree(later)
    file = again / "metrics.jsonl"
    lines = [line for line in file.read_text().splitlines() if json.loads(line)["step"] < step]
    file.write_text("".join(f"{line}\n" for line in lines))
    (again / BEST_FILE).write_bytes(b"of a later step")
    assert pretrain.main([*options, "--run.out", str(again)]) == 0
    kinds = ("step", "feature_std", "knn_low", SELECTION)
    found, expected = ([[r[k] for k in kinds] for r in probes(f)] for f in (again, folder))
    assert found == expected
    best = max(probes(folder), key=lambda row: row[SELECTION])["step"]
    if best >= step:
        assert (again / BEST_FILE).read_bytes() == (folder / BEST_FILE).read_bytes()


def test_the_start_is_a_line_of_the_report(run):
    """Also before there are closing scores."""
    _, folder = run
    story = read_story(folder)
    name = story.run.knn[0]
    start = dict(story.run.series(name))[0]
    story.scores.clear()
    assert _levels([story]) == {"initial encoder": start}
