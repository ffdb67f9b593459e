"""The evaluation door, in this process: what it prints and writes, and what it refuses."""

import itertools
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ssl_vit import evaluate
from ssl_vit.commands import finetuning, probing
from ssl_vit.commands.compare_options import CompareConfig
from ssl_vit.commands.comparing import run_options
from ssl_vit.commands.eval_options import EvalData, FeatureConfig
from ssl_vit.commands.evaluating import Evaluation
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.common.reading import ReadConfig
from ssl_vit.evaluators.backbone import open_backbone
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from tests.pairs import write_pairs

CONFIG = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(8,), patch_size=2, width=32, depth=4, heads=2
)
SETS = ("--data.train", "digits:train", "--data.val", "digits:val", "--data.workers", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the encoder file of a small ViT for digits."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    info = EncoderInfo(CONFIG, 1, (0.3,), (0.35,), "mae", 3)
    save_encoder(folder / "encoder.safetensors", Encoder(CONFIG, 1), info)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path_factory.getbasetemp() / "feature-cache"
    monkeypatch.setenv("SSL_VIT_CACHE", str(base))


def ask(name: str, run: Path | str, *options: str) -> None:
    assert evaluate.main([name, "--encoder", str(run), *SETS, *options]) == 0


def card(path: Path) -> dict:
    return json.loads(path.read_text())


def test_knn_writes_every_pooling_and_k_with_its_protocol(run, capsys):
    ask("knn", run, "--k", "1,10", "--out", str(run / "knn.json"))
    made = card(run / "knn.json")
    assert [(s["features"], s["setting"]) for s in made["scores"]] == [
        (f, f"k={k}") for f in ("cls", "mean") for k in (1, 10)
    ]
    assert made["train"]["images"] == 1438
    assert made["val"]["images"] == 359
    assert len(made["encoder"]["weights_sha256"]) == 64
    assert made["encoder"]["format"] == "ssl_vit"
    assert {"content_sha256", "labels_sha256"} <= made["val"].keys()
    score = made["scores"][0]
    low, high = score["interval"]
    assert low < score["metrics"]["top1"] < high
    assert np.sum(score["confusion"]) == 359
    assert f"{score['metrics']['top1']:.2f}" in capsys.readouterr().out


def test_again_gives_the_same_numbers_and_tells_when_not(run, tmp_path, capsys):
    out = tmp_path / "linear.json"
    ask("linear", run, "--epochs", "3", "--out", str(out))
    assert evaluate.main(["again", str(out)]) == 0
    assert "the scores are the same" in capsys.readouterr().out
    changed = card(out)
    changed["scores"][0]["metrics"]["top1"] += 0.1
    out.write_text(json.dumps(changed))
    with pytest.raises(RunFailed, match="the numbers differ"):
        evaluate.main(["again", str(out)])


def test_again_names_an_encoder_that_changed(run, tmp_path):
    other, out = tmp_path / "encoder.safetensors", tmp_path / "knn.json"
    other.write_bytes((run / "encoder.safetensors").read_bytes())
    ask("knn", other, "--k", "5", "--out", str(out))
    torch.manual_seed(1)
    save_encoder(other, Encoder(CONFIG, 1), EncoderInfo(CONFIG, 1, (0.3,), (0.35,)))
    with pytest.raises(RunFailed, match="encoder weights_sha256"):
        evaluate.main(["again", str(out)])


def test_again_refuses_what_is_no_card(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="is not an evaluation result"):
        evaluate.main(["again", str(tmp_path / "x.json")])


def test_knn_without_validation_images_is_leave_one_out(run, tmp_path):
    out = tmp_path / "knn.json"
    sets = ("--data.train", "digits:val", "--data.workers", "0")
    options = ("--encoder", str(run), *sets, "--k", "1", "--out", str(out))
    assert evaluate.main(["knn", *options]) == 0
    made = card(out)
    assert made["judged_on"] == "leave-one-out"
    assert made["scores"][0]["metrics"]["top1"] < 100  # each is not its own neighbour


def test_baselines_get_files_of_their_own(run):
    for kind in ("random", "pixels"):
        ask("knn", f"{kind}:{run}", "--k", "5")
        made = card(run / f"{kind}-{run.name}-knn.json")
        assert made["encoder"]["format"] == kind


def test_any_timm_network_is_a_comparator(tmp_path):
    out = tmp_path / "x.json"
    ask("knn", "random:timm:resnet10t", "--size", "32", "--k", "5", "--out", str(out))
    assert [s["features"] for s in card(out)["scores"]] == ["pooled"]


def test_features_come_from_the_cache_the_second_time(run, monkeypatch):
    options = FeatureConfig(
        data=EvalData(train="digits:train", val="digits:val", workers=0),
        encoder=str(run),
        batch_size=64,
    )
    first = Evaluation(options).features("val")
    monkeypatch.setattr(
        "ssl_vit.commands.evaluating.extract_shared", lambda *_: pytest.fail("made again")
    )
    again = Evaluation(options).features("val")
    assert all(torch.equal(first.parts[k], again.parts[k]) for k in first.parts)


def test_features_in_the_cache_are_of_images_read_in_the_same_way(run, tmp_path):
    """Another value for missing pixels makes others of the same files."""
    for i in range(4):
        image = np.random.default_rng(i).integers(0, 9, (8, 8)).astype(np.uint8)
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        np.save(tmp_path / "ab"[i % 2] / f"{i}.npy", image)

    def features(nodata: str) -> torch.Tensor:
        data = EvalData(train=f"folder:{tmp_path}", workers=0, nodata=nodata)
        config = FeatureConfig(data=data, encoder=str(run))
        return Evaluation(config, needs_val=False).features("train").parts["cls"]

    assert torch.equal(features("none"), features("none"))
    assert not torch.equal(features("none"), features("3"))


def test_fine_tuning_in_a_table_reads_images_in_the_same_way(tmp_path):
    data = EvalData(train="folder:a", val="folder:b", nodata="-9999", label_column=("x", "y"))
    config = CompareConfig(data=data, encoders=("run",))
    options = run_options(config, "run", tmp_path, "tune")
    found = list(itertools.pairwise(options))
    assert ("--data.nodata", "-9999") in found
    assert ("--data.label-column", "x") in found


def test_heads_that_weights_do_not_tell_of_make_other_features(run, tmp_path):
    other = replace(CONFIG, heads=4)
    torch.manual_seed(0)
    info = EncoderInfo(other, 1, (0.3,), (0.35,), "mae", 3)
    save_encoder(tmp_path / "encoder.safetensors", Encoder(other, 1), info)
    data = EvalData(train="digits:train", val="digits:val", workers=0)
    two, four = (Evaluation(FeatureConfig(data=data, encoder=str(f))) for f in (run, tmp_path))
    same = "weights_sha256"
    assert two.backbone.identity[same] == four.backbone.identity[same]
    assert not torch.equal(two.features("val").parts["cls"], four.features("val").parts["cls"])


def test_weights_of_a_file_for_any_timm_network(tmp_path):
    made = timm.create_model("resnet10t", num_classes=7)
    torch.save(made.state_dict(), tmp_path / "w.pth")
    found = open_backbone(f"timm:resnet10t:{tmp_path / 'w.pth'}", 0, (32,))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = made.eval().forward_head(made.forward_features(images), pre_logits=True)
        assert torch.equal(found.embed(("pooled",))(images)["pooled"], wanted)
    torch.save({"state_dict": {"conv1.0.weight": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="cannot be loaded"):
        open_backbone(f"timm:resnet10t:{tmp_path / 'w.pth'}", 0, (32,))
    torch.save({"model": made}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="refused"):
        open_backbone(f"timm:resnet10t:{tmp_path / 'w.pth'}", 0, (32,))


def test_names_of_timm_that_differ_after_a_dot_have_files_of_their_own():
    names = [
        f"random:timm:vit_tiny_patch16_224.{tag}"
        for tag in ("augreg_in21k", "augreg_in21k_ft_in1k")
    ]
    assert len({open_backbone(name, 0).label for name in names}) == 2


def test_of_several_features_a_published_protocol_chooses_one(run, tmp_path):
    options = ("--protocol", "mae", "--epochs", "1", "--features", "cls", "mean")
    few = ("--data.train", "digits:val", "--out", str(tmp_path / "x.json"))
    ask("linear", run, *options, *few)
    details = card(tmp_path / "x.json")["scores"][0]["details"]
    assert details["held_out_quality"].keys() == {"cls", "mean"}


def test_a_place_that_takes_no_result_is_refused_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "run", lambda *_: pytest.fail("worked"))
    (tmp_path / "file").write_text("")
    wrong = ((tmp_path / "file" / "x.json", "cannot be written"), (tmp_path, "a folder"))
    for out, message in wrong:
        with pytest.raises(UserError, match=message):
            ask("knn", run, "--out", str(out))


@pytest.mark.parametrize(
    ("evaluator", "options", "message"),
    [
        ("knn", ("--data.held-out", "digits:val"), "not for knn"),
        ("linear", ("--protocol", "mae", "--data.held-out", "digits:val"), "chooses no setting"),
        ("linear", ("--protocol", "logreg", "--probe-batch", "8"), "not for logreg"),
        ("knn", ("--k", "5", "0"), "--k is 5 0; it must be 1 or more"),
        ("knn", ("--k",), "--k is empty; it must have a value"),
        ("linear", ("--fraction", "1.5"), "at most 1"),
        ("linear", ("--per-class", "0"), "it must be 1 or more"),
    ],
)
def test_options_that_would_do_nothing_are_refused(run, evaluator, options, message):
    with pytest.raises(UserError, match=message):
        ask(evaluator, run, *options)


def test_a_larger_view_is_another_feature(run, tmp_path):
    for size in ("8", "16"):
        ask("knn", run, "--k", "5", "--size", size, "--out", str(tmp_path / f"{size}.json"))
    made = [card(tmp_path / f"{size}.json") for size in ("8", "16")]
    assert made[1]["transform"]["size"] == [16, 16]
    assert made[0]["scores"][0]["metrics"] != made[1]["scores"][0]["metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--features", "cls9"), "allowed: cls, mean"),
        (("--features", "pooled"), "has cls, mean"),
        (("--size", "9"), "divisible by the patch size, 2"),
        (("--data.labels", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_options_that_do_not_fit_are_refused(run, options, message):
    with pytest.raises(UserError, match=message):
        ask("knn", run, *options)


def folder_of(path: Path, classes: dict[str, int], size: int = 8) -> str:
    rng = np.random.default_rng(len(classes))
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(path / name / f"{i}.png")
    return f"folder:{path}"


def test_bad_sets_are_refused_before_anything_is_written(run, tmp_path):
    two = folder_of(tmp_path / "two", {"a": 12, "b": 12})
    cases = {
        folder_of(tmp_path / "one", {"a": 12}): "no labels .none: 'a' is the only folder",
        folder_of(tmp_path / "flat", {".": 3}): "no labels",
    }
    out = tmp_path / "x.json"
    for name in ("knn", "linear"):
        for train, message in cases.items():
            sets = ("--data.train", train, "--data.val", train, "--data.workers", "0")
            with pytest.raises(UserError, match=message):
                evaluate.main([name, "--encoder", str(run), *sets, "--out", str(out)])
        three = f"folder:{tmp_path / 'three'}"
        if name == "knn":
            folder_of(tmp_path / "three", {"a": 2, "b": 2, "c": 2})
        sets = ("--data.train", two, "--data.val", three, "--data.workers", "0")
        with pytest.raises(UserError, match="'c'"):
            evaluate.main([name, "--encoder", str(run), *sets, "--out", str(out)])
    assert not out.exists()


def test_images_of_other_channels_than_the_encoder_are_named(run, tmp_path):
    for i in range(4):
        (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "set" / "ab"[i % 2] / f"{i}.npy", np.zeros((8, 8, 5), np.uint8))
    sets = (f"folder:{tmp_path / 'set'}",) * 2
    options = ("--data.train", sets[0], "--data.val", sets[1], "--data.workers", "0")
    takes = f"have 5 channels; --encoder {run} takes images of 1"
    with pytest.raises(UserError, match=takes):
        evaluate.main(["knn", "--encoder", str(run), *options])


def test_values_far_from_the_encoders_are_a_warning(run, tmp_path, caplog):
    """Features of them are measured all the same; missing pixels among them do no harm."""
    rng = np.random.default_rng(0)
    for i in range(8):
        image = rng.normal(2000, 300, (8, 8)).astype(np.float32)
        image[:2] = np.nan
        (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "set" / "ab"[i % 2] / f"{i}.npy", image)
    spec = f"folder:{tmp_path / 'set'}"
    options = ("--data.train", spec, "--data.val", spec, "--data.workers", "0", "--k", "3")
    out = tmp_path / "x.json"
    assert evaluate.main(["knn", "--encoder", str(run), *options, "--out", str(out)]) == 0
    (said,) = [r.message for r in caplog.records if r.message.startswith("warning: the images of")]
    assert "the encoder is given values around" in said
    assert json.loads(out.read_text())["train"]["unreadable"] == 0


def test_low_shot_is_a_mean_over_seeds(run, tmp_path):
    out = tmp_path / "low.json"
    options = ("--per-class", "1,5", "--repeats", "2", "--epochs", "3", "--out", str(out))
    ask("linear", run, *options)
    one, five = card(out)["scores"]
    assert one["setting"].startswith("1 a class")
    assert len(five["details"]["seeds"]) == 2
    values = [s["metrics"]["top1"] for s in five["details"]["seeds"]]
    assert five["metrics"]["top1"] == pytest.approx(np.mean(values))
    assert len(set(values)) == 2  # of other images
    assert one["metrics"]["top1"] < five["metrics"]["top1"]


def test_labels_from_a_csv_one_or_several(run, tmp_path):
    folder_of(tmp_path / "x", {".": 40})
    flat = ("--data.train", f"flat:{tmp_path / 'x'}", "--data.val", f"flat:{tmp_path / 'x'}")
    names = [f"{i}.png" for i in range(40)]
    one, several = tmp_path / "one.csv", tmp_path / "several.csv"
    one.write_text("image,kind\n" + "".join(f"{n},{'ab'[i % 2]}\n" for i, n in enumerate(names)))
    rows = "".join(f"{n},{i % 2},{'' if i == 3 else i % 3 % 2}\n" for i, n in enumerate(names))
    several.write_text("image,odd,third\n" + rows)
    out = tmp_path / "x.json"
    for evaluator in ("knn", "linear"):
        for labels, metrics in ((one, {"top1", "top5"}), (several, {"map", "auroc"})):
            options = ("--data.labels", str(labels), "--data.workers", "0", "--out", str(out))
            more = ("--k", "5") if evaluator == "knn" else ("--epochs", "3")
            assert evaluate.main([evaluator, "--encoder", str(run), *flat, *options, *more]) == 0
            made = card(out)
            assert made["scores"][0]["metrics"].keys() == metrics
            assert made["scores"][0]["per_class"].keys() <= {"a", "b", "odd", "third"}
            assert evaluate.main(["again", str(out)]) == 0


def csv_of_several(folder: Path, count: int = 40) -> tuple[str, Path]:
    """Images of which half are bright, and a CSV of whether they are, and of another label."""
    folder.mkdir()
    lines = ["image,bright,third"]
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 60, (8, 8)) + 150 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{i % 2},{'' if i == 3 else i % 3 % 2}")
    path = folder.parent / "several.csv"
    path.write_text("\n".join(lines))
    return f"flat:{folder}", path


TUNE = ("--tune.randaugment", "none", "--run.device", "cpu", "--run.precision", "fp32")
TUNE += ("--optim.batch-size", "20", "--optim.warmup", "1st", "--data.workers", "0")


def test_finetune_takes_several_labels_of_a_csv(run, tmp_path, capsys):
    """Scored as the linear probe is, from the same file, mixed and smoothed as usual."""
    spec, labels = csv_of_several(tmp_path / "x")
    sets = ("--data.train", spec, "--data.val", spec, "--data.labels", str(labels))
    options = (*TUNE, "--run.length", "15st", "--run.probe-every", "5st", "--optim.lr", "1e-2")
    options += ("--tune.layer-decay", "1", "--tune.crop-scale", "0.5", "1")
    out = tmp_path / "tuned"
    argv = ["finetune", "--encoder", str(run), *sets, *options, "--run.out", str(out)]
    assert evaluate.main(argv) == 0
    made = card(out / "finetune.json")
    (score,) = made["scores"]
    assert score["metrics"].keys() == {"map", "auroc"}
    assert score["per_class"].keys() == {"bright", "third"}
    assert score["per_class"]["bright"] > 90
    assert made["train"]["classes"] == made["val"]["classes"] == 2
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "val_map" in r] == [5, 10, 15]
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 labels, several an image, from columns bright, third of several.csv" in shown
    assert "mAP" in shown


def test_finetune_takes_the_classes_of_a_csv_and_leaves_out_what_has_none(run, tmp_path, caplog):
    spec, labels = csv_of_several(tmp_path / "x")
    sets = ("--data.train", spec, "--data.val", spec, "--data.labels", str(labels))
    options = (*TUNE, "--run.length", "1st", "--data.label-column", "third")
    out = tmp_path / "tuned"
    argv = ["finetune", "--encoder", str(run), *sets, *options, "--run.out", str(out)]
    assert evaluate.main(argv) == 0
    made = card(out / "finetune.json")
    assert made["scores"][0]["metrics"].keys() == {"top1", "top5"}
    assert (made["train"]["images"], made["val"]["images"]) == (39, 39)
    assert "--data.train: 1 of 40 images have no label and are left out" in caplog.text


def test_compare_gives_finetune_all_that_says_how_images_are_read(run, tmp_path):
    recipe = tmp_path / "tune.yaml"
    recipe.write_text("optim: {batch_size: 20}")
    data = EvalData(
        *("-9999", "all", "full", "rgb.png", "labels.csv", ("third", "bright")),
        bands=(3, 1, 2),
        values="scaled",
        tile=(64, 96),
        level=1,
        window=("-600", "1500"),
        group="name:x",
        shard_cache="shards",
        shard_cache_size=2.0,
        cache_reserve=3.0,
        train="flat:a",
        val="flat:b",
        workers=0,
    )
    assert data.label_column == ("third", "bright")
    config = CompareConfig(data=data, encoders=("x",), recipe=str(recipe))
    tuned = run_options(config, str(run), tmp_path / "tuned", "tune")
    options, _ = finetuning.parse_options(tuned)
    for option in fields(ReadConfig):
        assert getattr(options.data, option.name) == getattr(data, option.name) != option.default
    assert (options.data.train, options.data.workers) == ("flat:a", 0)


def test_images_without_a_label_are_left_out_of_a_score_with_a_word(run, tmp_path, caplog):
    spec, labels = csv_of_several(tmp_path / "x")
    text = labels.read_text().splitlines()
    labels.write_text("\n".join(text[:-4]))
    out = tmp_path / "x.json"
    sets = ("--data.train", spec, "--data.labels", str(labels), "--data.label-column", "bright")
    options = ("--k", "5", "--out", str(out), "--data.workers", "0")
    caplog.set_level("INFO")
    assert evaluate.main(["knn", "--encoder", str(run), *sets, *options]) == 0
    assert card(out)["train"]["images"] == 36
    assert "has no line for 4 of 40 images" in caplog.text
    assert "--data.train: 4 of 40 images have no label and are left out" in caplog.text
    assert "labels of --data.train: 2 classes, from column bright of several.csv" in caplog.text


def test_per_class_of_several_labels_names_the_option_to_give(run, tmp_path):
    spec, labels = csv_of_several(tmp_path / "x")
    sets = ("--data.train", spec, "--data.val", spec, "--data.labels", str(labels))
    argv = ["linear", "--encoder", str(run), *sets, "--data.workers", "0", "--per-class", "1", "5"]
    with pytest.raises(UserError, match=r"--per-class is 1 5; .* give a share .* --fraction 0.25"):
        evaluate.main(argv)


def test_segment_learns_what_patches_show_and_can_be_done_again(run, tmp_path, capsys):
    write_pairs(tmp_path / "pairs")
    spec, out = f"pairs:{tmp_path / 'pairs'}", tmp_path / "segment.json"
    options = ("--data.train", spec, "--data.val", spec, "--data.workers", "0", "--out", str(out))
    options = ("--encoder", str(run), *options, "--size", "16", "--epochs", "10")
    assert evaluate.main(["segment", *options]) == 0
    assert card(out)["scores"][0]["metrics"]["miou"] > 80
    picture = tmp_path / "segment-boundaries.png"
    printed = capsys.readouterr().out
    assert "miou" in printed
    assert f"boundaries: {picture}" in printed
    assert Image.open(picture).size[0] > 3 * 320
    earlier = card(out)
    earlier["scores"][0]["metrics"].pop("dice")  # as before there was Dice
    earlier["options"].pop("head")
    out.write_text(json.dumps(earlier))
    picture.unlink()
    assert evaluate.main(["again", str(out)]) == 0
    assert not picture.exists()
    earlier["scores"][0]["metrics"]["miou"] -= 0.01
    out.write_text(json.dumps(earlier))
    with pytest.raises(RunFailed, match="the numbers differ"):
        evaluate.main(["again", str(out)])
    first = tmp_path / "pairs" / "masks" / "0.png"
    Image.fromarray(np.ones((16, 16), np.uint8)).save(first)
    with pytest.raises(RunFailed, match="train masks_sha256"):
        evaluate.main(["again", str(out)])


def test_compare_writes_one_table_for_all(run, tmp_path, capsys):
    recipe = tmp_path / "tune.yaml"
    recipe.write_text(
        "run: {length: 2st, probe_every: 9ep, save_every: 9ep}\n"
        "tune: {randaugment: none}\noptim: {batch_size: 64, warmup: 1st}\n"
    )
    out = tmp_path / "compare"
    encoders = (f"raw pixels=pixels:{run}", f"untrained=random:{run}", f"ours={run}")
    options = ("--evaluators", "knn", "logreg", "finetune", "--recipe", str(recipe))
    # How good they are is told by no test: few images do.
    sets = (*SETS, "--data.train", "digits:val", "--data.val", "digits:val")
    argv = ["compare", "--encoders", *encoders, *options, *sets, "--out", str(out)]
    assert evaluate.main(argv) == 0
    rows = [line.split(",") for line in (out / "compare.csv").read_text().splitlines()]
    assert [(r[0], r[1]) for r in rows[1:]] == [
        ("raw pixels", "knn"),
        ("raw pixels", "logreg"),
        *[(n, e) for n in ("untrained", "ours") for e in ("knn", "logreg", "finetune")],
    ]
    cards = card(out / "compare.json")
    assert cards["ours"]["finetune"]["scores"][0]["metrics"]["top1"] == pytest.approx(
        float(rows[-1][5]), abs=1e-3
    )
    assert Image.open(out / "compare.png").size[0] > 400
    assert "raw pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--encoders is missing"),
        (("--encoders", "a", "a"), "'a' twice"),
        (("--encoders", "a", "--evaluators", "finetune"), "--recipe is missing"),
    ],
)
def test_compare_refuses(options, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(["compare", *options, *SETS])


def test_of_many_images_only_the_features_asked_for_are_made(run, monkeypatch):
    data = EvalData(train="digits:train", val="digits:val", workers=0)
    options = FeatureConfig(data=data, encoder=str(run), batch_size=359)
    assert len(Evaluation(options, plain=True).features("val").parts) == 5
    monkeypatch.setattr("ssl_vit.commands.evaluating._ALL_PARTS", 1000)
    assert set(Evaluation(options, plain=True).features("val").parts) == {"cls", "mean"}
    assert len(Evaluation(options).features("val").parts) == 5
