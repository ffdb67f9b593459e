"""Groups in evaluators: intervals over them, no votes of one's own, and selection between them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from ssl_vit import evaluate
from ssl_vit.commands.finetuning import labelled_images
from ssl_vit.commands.pretrain_options import PretrainConfig
from ssl_vit.commands.pretraining import build
from ssl_vit.common.config import EncoderConfig, RunConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.rates import PretrainOptim
from ssl_vit.common.reading import DataConfig
from ssl_vit.data.base import Subset
from ssl_vit.data.sources import open_source
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.intervals import accuracy_interval, mean_precision_interval
from ssl_vit.evaluators.knn import knn_predictions, others
from ssl_vit.evaluators.linear import LinearProtocol, linear_probe
from ssl_vit.evaluators.logreg import LogregProtocol, logreg_probe
from ssl_vit.evaluators.online import _split, source_targets
from ssl_vit.evaluators.options import FinetuneConfig
from ssl_vit.evaluators.overlap import Overlap, iou
from ssl_vit.evaluators.published import Dinov2Protocol
from ssl_vit.evaluators.quick_scores import knn_scores
from ssl_vit.evaluators.selection import NOT_CHOSEN, split_rows
from ssl_vit.evaluators.watch import _leave_one_out
from ssl_vit.options.mae import MAEConfig
from tests.unit.data.test_dicom import written
from tests.unit.feature_sets import feature_set, normal, top1

CPU = torch.device("cpu")


def drawn_groups(seed: int, groups: np.ndarray, times: int) -> list[np.ndarray]:
    """Images of each resample of whole groups, by the definition, one by one."""
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    names = sorted(set(groups.tolist()))
    found = []
    for _ in range(times):
        images: list[int] = []
        for name in random.randint(0, len(names), len(names)):
            images += np.flatnonzero(groups == names[name]).tolist()
        found.append(np.array(images))
    return found


# --- intervals ----------------------------------------------------------------------------------


def test_the_interval_of_an_accuracy_is_that_of_resampled_groups():
    random = np.random.default_rng(0)
    groups = random.integers(0, 17, 120).astype(np.int64)
    correct = random.random(120) < 0.2 + 0.6 * (groups % 2)
    by_loop = [100 * correct[i].mean() for i in drawn_groups(3, groups, 1000)]
    expected = np.percentile(by_loop, (2.5, 97.5))
    found = accuracy_interval(correct, 3, groups)
    assert found == pytest.approx(tuple(expected), abs=1e-9)
    alone = accuracy_interval(correct, 3)
    assert found[1] - found[0] > 1.3 * (alone[1] - alone[0])


def test_the_interval_of_a_mean_precision_is_that_of_resampled_groups():
    random = np.random.default_rng(1)
    groups = random.integers(-4, 9, 60).astype(np.int64)
    truth = (random.random((60, 3)) < 0.4).astype(np.float64)
    scores = truth + random.normal(size=(60, 3))
    truth[random.random((60, 3)) < 0.1] = np.nan
    means = []
    for images in drawn_groups(5, groups, 200):
        found = []
        for label in range(3):
            known = images[~np.isnan(truth[images, label])]
            if 0 < truth[known, label].sum() < len(known):
                found.append(average_precision_score(truth[known, label], scores[known, label]))
        means.append(100 * np.mean(found))
    expected = tuple(np.percentile(means, (2.5, 97.5)))
    assert mean_precision_interval(scores, truth, 5, groups) == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_masks_is_over_groups():
    """As over images, each the sum of a group's."""
    images = torch.randint(1, 50, (12, 3, 4), generator=torch.Generator().manual_seed(0))
    images[:, 1:] += images[:, :1]
    groups = torch.tensor([5, 5, 5, -1, 2, 2, 9, 9, 9, 9, 2, 5])
    summed = torch.stack([images[groups == g].sum(0) for g in (-1, 2, 5, 9)])
    table = torch.zeros(4, 4, dtype=torch.int64)
    found = Overlap(table, images, groups).interval(1)
    assert found == Overlap(table, summed).interval(1) != Overlap(table, images).interval(1)
    assert found[0] < 100 * float(iou(images.sum(0).double()).nanmean()) < found[1]


def test_a_score_says_that_its_interval_is_over_groups():
    own = feature_set(torch.arange(40) % 2, mean=normal(40, 4))
    grouped = replace(own, groups=torch.arange(40) // 4)
    plain, by_group = (knn_scores(own, each, (3,))[0] for each in (own, grouped))
    assert plain.metrics == by_group.metrics
    assert by_group.details["interval_of_groups"] == 10
    assert "interval_of_groups" not in plain.details


# --- neighbours ---------------------------------------------------------------------------------


def patients(count: int, each: int, seed: int = 0) -> FeatureSet:
    """Images of patients, who look like themselves and have a class at random."""
    of = torch.arange(count).repeat_interleave(each)
    labels = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed))[of]
    looks = normal(count, 96, seed=seed + 1)[of] + 0.05 * normal(count * each, 96, seed=seed + 2)
    shuffled = torch.randperm(len(of), generator=torch.Generator().manual_seed(seed))
    made = FeatureSet({"mean": looks}, labels, 0, torch.arange(len(of)), of)
    return replace(made.take(shuffled), index=torch.arange(len(of)))


@pytest.mark.parametrize("rows", [1 << 16, 7])
def test_images_of_ones_own_group_do_not_vote(rows, monkeypatch):
    monkeypatch.setattr("ssl_vit.evaluators.knn._BANK_ROWS", rows)
    train = patients(12, 5)
    found = knn_predictions(train, None, (3,), ("mean",), CPU)[0]
    x = torch.nn.functional.normalize(train.parts["mean"], dim=1)
    for i in range(60):
        theirs = [j for j in range(60) if train.groups[j] != train.groups[i]]
        cosines = x[theirs] @ x[i]
        best = cosines.argsort(descending=True)[:3]
        votes = torch.zeros(2)
        for j in best.tolist():
            votes[train.labels[theirs[j]]] += (cosines[j] / 0.07).exp()
        assert int(found.guesses[i, 0]) == int(votes.argmax())


def test_leave_one_out_among_patients_is_chance_and_without_groups_a_leak():
    train = patients(60, 5)
    assert top1(knn_predictions(train, None, (4,), ("mean",), CPU)[0], train.labels) < 70
    leaking = replace(train, groups=None)
    assert top1(knn_predictions(leaking, None, (4,), ("mean",), CPU)[0], train.labels) == 100
    assert _leave_one_out(train) < 70 < _leave_one_out(leaking)


def test_as_many_neighbours_as_other_groups_have():
    train = patients(3, 10)
    assert others(train) == 20
    assert others(replace(train, groups=None)) == 29
    assert len(knn_predictions(train, None, (20, 21), ("mean",), CPU)) == 1
    with pytest.raises(UserError, match="has 30 images, and 20 beside the largest group"):
        knn_predictions(train, None, (21,), ("mean",), CPU)


# --- selection ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.integers(-3, 15), min_size=20, max_size=90),
    classes=st.integers(1, 4),
    share=st.sampled_from([0.1, 0.3]),
    seed=st.integers(0, 3),
)
def test_selection_parts_no_group_and_keeps_every_class(groups, classes, share, seed):
    n = len(groups)
    random = np.random.default_rng(seed)
    rare = np.where(random.random(n) < 0.2, random.integers(0, classes, n), 0)
    labels, of = torch.from_numpy(rare), torch.tensor(groups)
    rows = split_rows(labels, share, seed, of)
    if rows is None:
        return
    kept, held = rows
    assert sorted(torch.cat(rows).tolist()) == list(range(n))
    assert not set(of[kept].tolist()) & set(of[held].tolist())
    assert set(labels[kept].tolist()) == set(labels.tolist())
    smallest = int(of.unique(return_counts=True)[1].min())
    assert len(held) <= max(round(share * n), 1) or smallest <= len(held) <= n // 2


def test_nothing_is_selected_where_every_group_has_a_class_for_itself():
    labels = torch.arange(4).repeat_interleave(10)
    assert split_rows(labels, 0.1, 0, labels) is None
    assert split_rows(labels, 0.1, 0, torch.zeros(40).long()) is None
    halves = torch.arange(40) % 2
    assert [len(part) for part in split_rows(labels, 0.1, 0, halves)] == [20, 20]


@pytest.mark.parametrize("probe", [linear_probe, logreg_probe])
def test_settings_are_chosen_on_groups_that_were_not_trained_on(probe):
    """Patients who look like themselves only: by images the selection would be perfect."""
    train, val = patients(60, 5), patients(10, 5, seed=7)
    own = {"features": ("mean",)}
    protocol = LogregProtocol(**own) if probe is logreg_probe else LinearProtocol(**own)

    def best(of: FeatureSet) -> float:
        details = probe(of, val, protocol)[0].details
        return max(details["held_out_quality"]["mean"].values())

    assert best(train) < 80 < 95 < best(replace(train, groups=None))
    two = train.take((train.groups < 1).nonzero()[:, 0])
    if probe is linear_probe:
        assert probe(two, val, protocol)[0].details["selection"] == NOT_CHOSEN


def test_published_probes_hold_out_whole_groups():
    digits = open_source("digits:train")
    digits.groups = np.arange(len(digits)) // 4
    source = Subset(digits, np.arange(200))
    kept, held = _split(source, source_targets(source), Dinov2Protocol())
    assert held is not None
    assert len(held) == 20
    assert not set(kept.groups) & set(held.groups)


# --- doors --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """DICOM files of two classes in folders, two of a patient, for training and validation."""
    root = tmp_path_factory.mktemp("dicom")
    random = np.random.default_rng(0)
    for part, first, count in (("train", 0, 24), ("val", 22, 8)):
        for i in range(2 * count):
            patient = first + i // 2
            pixels = random.integers(0, 100, (8, 8)).astype(np.uint8) + 100 * (patient % 2)
            folder = root / part / "ab"[patient % 2]
            folder.mkdir(parents=True, exist_ok=True)
            raw = written(pixels.astype(np.uint8), PatientID=f"P{patient}")
            (folder / f"{i:02d}.dcm").write_bytes(raw)
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    from ssl_vit.model.encoder import Encoder
    from ssl_vit.weights.exchange import EncoderInfo, save_encoder

    config = EncoderConfig("vit_tiny_patch16_224", (8,), 4, width=16, depth=2, heads=2)
    path = tmp_path_factory.mktemp("run") / "encoder.safetensors"
    save_encoder(path, Encoder(config, 1), EncoderInfo(config, 1, (0.3,), (0.35,), "mae", 3))
    return path


def sets(archives: Path, *parts: str) -> list[str]:
    given = [f"--data.{part}=folder:{archives / part}" for part in parts]
    return [*given, "--data.workers", "0", "--data.group", "PatientID", "--cache", "False"]


def test_evaluate_knn_by_patient(archives, encoder, tmp_path, capsys, caplog, monkeypatch):
    """The card and the table name the groups, which are no part of cached features."""
    out = tmp_path / "knn.json"
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    own = ["--encoder", str(encoder), "--k", "5", "--out", str(out)]
    flags = sets(archives, "train")[:-2]
    caplog.set_level("INFO")
    for _ in range(2):
        assert evaluate.main(["knn", *own, *flags]) == 0
    assert "read from the cache" in caplog.text
    card = json.loads(out.read_text())
    assert card["train"]["groups"] == 24
    assert card["scores"][0]["details"]["interval_of_groups"] == 24
    printed = " ".join(capsys.readouterr().out.split())
    assert "48 evaluation images of 24 groups, 48 training images" in printed


def test_evaluate_warns_of_patients_on_both_sides(archives, encoder, tmp_path, capsys, caplog):
    out = tmp_path / "linear.json"
    own = ["--encoder", str(encoder), "--out", str(out), "--epochs", "1"]
    assert evaluate.main(["linear", *own, *sets(archives, "train", "val")]) == 0
    card = json.loads(out.read_text())
    assert (card["val"]["groups"], card["val"]["groups_in_training"]) == (8, 2)
    assert "2 OF THE GROUPS ARE IN TRAINING, TOO" in " ".join(capsys.readouterr().out.split())
    assert "2 of 8 groups of --data.val are in --data.train, too" in caplog.text


def test_compare_passes_groups_on(archives, encoder, tmp_path, capsys):
    out = tmp_path / "compare"
    flags = [f for f in sets(archives, "train", "val") if f not in ("--cache", "False")]
    own = ["--encoders", f"one={encoder}", "--evaluators", "knn", "--out", str(out)]
    assert evaluate.main(["compare", *own, *flags]) == 0
    card = json.loads((out / "compare.json").read_text())["one"]["knn"]
    assert card["scores"][0]["details"]["interval_of_groups"] == 8
    assert "2 OF ITS GROUPS ARE IN TRAINING" in " ".join(capsys.readouterr().out.split())


def test_pretraining_and_fine_tuning_hold_out_patients(archives, tmp_path):
    data = DataConfig(
        train=f"folder:{archives / 'train'}", channels=1, group="PatientID", workers=0
    )
    config = PretrainConfig(
        method=MAEConfig(decoder_depth=1, decoder_width=16),
        data=data,
        run=RunConfig(out=str(tmp_path / "run")),
        encoder=EncoderConfig("vit_tiny_patch16_224", (8,), 4, width=16, depth=1, heads=2),
        optim=PretrainOptim(batch_size=8),
    )
    session = build("mae", config)
    plan = dict(session.plan(session.about()))
    assert plan["groups"] == "22 by PatientID, 2 held out: none in both"
    tuned = labelled_images(FinetuneConfig(data=data), None)
    images = session.images
    for train, val in (session.watched, (images.train, images.val), (tuned.train, tuned.val)):
        assert len(val) == 4
        assert not set(train.groups) & set(val.groups)
    few = replace(data, train=f"folder:{archives / 'val'}")
    with pytest.raises(UserError, match="holds no image out: of 8 groups"):
        labelled_images(FinetuneConfig(data=few), None)
