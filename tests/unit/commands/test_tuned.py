"""Networks that finetune and detect leave, reopened: scored again to the digit, and used."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pycocotools import mask as library

import ssl_vit
from ssl_vit import evaluate
from ssl_vit.benchmarks.scenes import open_studio, write_scenes
from ssl_vit.commands.detecting import Detection
from ssl_vit.commands.detecting import parse_options as detect_options
from ssl_vit.commands.finetuning import parse_options as finetune_options
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.data.base import known_labels
from ssl_vit.data.sources import open_source
from ssl_vit.data.view import View
from ssl_vit.evaluators.depth_kind import DepthKind
from ssl_vit.evaluators.depth_metrics import image_metrics
from ssl_vit.evaluators.detect import detect
from ssl_vit.evaluators.detect_options import DetectOptions
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.options import DepthTuneConfig, SegmentTuneConfig
from ssl_vit.evaluators.overlap import confusion_matrix, counts, iou
from ssl_vit.evaluators.reopen import open_tuned
from ssl_vit.evaluators.segment_kind import SegmentKind
from ssl_vit.evaluators.start import Start
from ssl_vit.evaluators.tuned_detector import TunedDetector, detector_of
from ssl_vit.evaluators.tuned_pixels import TunedPixels, dense_network
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from ssl_vit.weights.own_files import DETECTOR_FILE, MODEL_FILE
from tests.unit.coco_files import NAMES, coco_at

TINY = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(32,), patch_size=8, width=32, depth=2, heads=2
)
SETS = {"classes": "folder", "segment": "pairs", "depth": "depth", "detect": "coco"}
OPTIONS = {
    "classes": ("--tune.randaugment", "none", "--tune.image-size", "48"),
    "segment": ("--tune.image-size", "48", "--segment.head", "mlp", "--segment.flip", "True"),
    "depth": ("--tune.image-size", "48", "--depth.scale", "0.001"),
    "detect": (
        *("--detect.image-size", "64", "--detect.width", "16", "--detect.proposals", "32"),
        *("--detect.jitter", "0.9", "1.1", "--run.length", "24st", "--optim.lr", "5e-3"),
        *("--detect.detections", "20", "--run.probe-every", "100ep"),
    ),
}
CARDS = dict.fromkeys(SETS, "finetune.json") | {"detect": "detect.json"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Scenes, of which half are of either class, an encoder, and a short run of each kind."""
    folder = tmp_path_factory.mktemp("tuned")
    for part, count, seed in (("train", 12, 0), ("val", 6, 1), ("other", 5, 2)):
        studio = open_studio("digits:val", "", 48, 3, seed)
        write_scenes(studio, count, folder / part, [str(n) for n in range(10)])
        for i, file in enumerate(sorted((folder / part / "images").iterdir())):
            target = folder / part / "folder" / ("few", "many")[i % 2]
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / file.name)
        coco_at(folder / part / "coco", count=count, seed=seed)  # easier than digits
    torch.manual_seed(0)
    info = EncoderInfo(TINY, 3, (0.5,) * 3, (0.2,) * 3, "mae", 1)
    save_encoder(folder / "encoder.safetensors", Encoder(TINY, 3), info)
    for kind in SETS:
        door = "detect" if kind == "detect" else "finetune"
        assert evaluate.main([door, *arguments(folder, kind), *OPTIONS[kind]]) == 0
    return folder


def spec(folder, kind, part) -> str:
    inner = SETS[kind] if kind in ("classes", "detect") else ""
    return f"{SETS[kind]}:{folder / part / inner}"


def arguments(folder, kind) -> list[str]:
    sets = [x for p in ("train", "val") for x in (f"--data.{p}", spec(folder, kind, p))]
    return [
        *("--encoder", str(folder / "encoder.safetensors"), "--run.out", str(folder / kind)),
        *("--run.length", "2st", "--optim.warmup", "1st", "--optim.batch-size", "4"),
        *("--optim.lr", "1e-2", "--run.precision", "fp32", "--data.workers", "0", *sets),
    ]


def card_of(folder, kind) -> dict:
    return json.loads((folder / CARDS[kind]).read_text())


@pytest.mark.parametrize("kind", SETS)
def test_the_score_is_repeated_without_training(place, kind, capsys, tmp_path):
    """Also of a run that was moved away from its encoder; and not of other numbers or weights."""
    moved = tmp_path / "moved"
    shutil.copytree(place / kind, moved)
    path = moved / CARDS[kind]
    assert evaluate.main(["again", str(path)]) == 0
    said = capsys.readouterr().out
    assert "the scores are the same" in said
    assert "6 evaluation and 12 training" in " ".join(said.split())
    card = card_of(moved, kind)
    name, value = next(iter(card["scores"][0]["metrics"].items()))
    assert 1 < value < 99  # else any network would have the same
    card["scores"][0]["metrics"][name] += 0.1
    path.write_text(json.dumps(card))
    with pytest.raises(RunFailed, match="the numbers differ"):
        evaluate.main(["again", str(path)])
    file = moved / card["model"]["file"].rpartition("/")[2]
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(RunFailed, match=r"model sha256 was .* and is .* now"):
        evaluate.main(["again", str(path)])


@pytest.mark.parametrize("kind", SETS)
def test_other_images_are_scored(place, kind, tmp_path, capsys):
    """As a run would that has them for validation; and the training images are not needed."""
    path, out = place / kind / CARDS[kind], tmp_path / "out"
    other = ("--data.val", spec(place, kind, "other"), "--data.train", "folder:gone")
    assert evaluate.main(["again", str(path), *other, "--run.out", str(out)]) == 0
    assert "of other images than in" in capsys.readouterr().out
    first, now = card_of(place / kind, kind), card_of(out, kind)
    assert now["val"]["images"] == 5
    assert now["scores"] != first["scores"]
    assert now["model"] == first["model"]
    assert now["train"] == first["train"]
    assert evaluate.main(["again", str(path), "--data.val", spec(place, kind, "val")]) == 0
    assert "the scores are the same" in capsys.readouterr().out


def test_other_options_of_the_score_are_no_repetition(place, tmp_path, capsys):
    path, out = place / "depth" / CARDS["depth"], tmp_path / "out"
    assert (
        evaluate.main(["again", str(path), "--depth.scale", "0.0008", "--run.out", str(out)]) == 0
    )
    assert "scored by other options than in" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"a network of depth: --segment.flip has no effect"):
        evaluate.main(["again", str(path), "--segment.flip", "True"])
    assert card_of(out, "depth")["scores"] != card_of(place / "depth", "depth")["scores"]


def test_runs_of_each_kind_have_a_folder_of_their_own(place, tmp_path):
    """So that one encoder may be tuned for all of them by default."""
    shutil.copy(place / "encoder.safetensors", tmp_path)
    found = []
    for kind in ("classes", "segment", "depth"):
        sets = ("--data.train", spec(place, kind, "train"), "--data.val", spec(place, kind, "val"))
        config, _ = finetune_options(["--encoder", str(tmp_path), *sets])
        found.append(config.run.out.rpartition("/")[2])
    assert found == ["finetune", "finetune-pairs", "finetune-depth"]


def test_images_that_were_held_out_are_found_again(place, tmp_path, capsys):
    """By the training images, which are then needed; and of a card of features no option is one."""
    options = [*arguments(place, "segment"), *OPTIONS["segment"], "--data.val=", "--run.length=1st"]
    options[options.index("--run.out") + 1] = str(tmp_path)
    assert evaluate.main(["finetune", *options]) == 0
    assert evaluate.main(["again", str(tmp_path / "finetune.json")]) == 0
    said = capsys.readouterr().out.rpartition("finetune: ")[2]
    assert "1 evaluation and 11 training" in " ".join(said.split())
    knn, sets = str(tmp_path / "knn.json"), ("--data.train", spec(place, "classes", "train"))
    encoder = ("--encoder", str(place / "encoder.safetensors"))
    assert evaluate.main(["knn", *encoder, *sets, "--k", "1", "--out", knn]) == 0
    with pytest.raises(UserError, match="options are for cards of finetune and detect"):
        evaluate.main(["again", knn, "--data.val", "digits"])


@pytest.mark.parametrize("kind", ["segment", "detect"])
def test_the_training_images_are_no_test(place, kind, caplog):
    path = place / kind / CARDS[kind]
    assert evaluate.main(["again", str(path), "--data.val", spec(place, kind, "train")]) == 0
    assert "--data.val and --data.train are the same images: the score is no test" in caplog.text


def images_of(folder, kind):
    """Validation images, and paths of their files."""
    source = open_source(spec(folder, kind, "val"))
    return source, [source.name(i) for i in range(len(source))]


def test_a_classifier_is_used(place):
    model = ssl_vit.load_model(place / "classes")
    source, paths = images_of(place, "classes")
    found = model.predict(paths)
    assert (model.kind, model.classes) == ("classes", ("few", "many"))
    torch.testing.assert_close(found.sum(1), torch.ones(len(paths)))
    right = 100 * float(np.mean(found.argmax(1).numpy() == source.labels))
    assert known_labels(source).all()
    (score,) = card_of(place / "classes", "classes")["scores"]
    assert right == pytest.approx(score["metrics"]["top1"])


def test_a_segmenter_is_used(place):
    """Averaged over mirror images, as its score was."""
    model = ssl_vit.load_model(place / "segment" / MODEL_FILE)
    source, paths = images_of(place, "segment")
    table = torch.zeros(len(model.classes), len(model.classes), dtype=torch.int64)
    for i, guess in enumerate(model.predict(paths)):
        truth = source.target(i).long()
        assert guess.shape == truth.shape
        table += confusion_matrix(truth.flatten(), guess.flatten(), len(model.classes))
    expected = card_of(place / "segment", "segment")["scores"][0]["metrics"]["miou"]
    assert 100 * float(iou(counts(table).double()).nanmean()) == pytest.approx(expected, abs=0.2)


def test_depths_are_used(place):
    model = ssl_vit.load_model(place / "depth")
    source, paths = images_of(place, "depth")
    source.scale = 0.001
    made = model.predict(paths)
    assert model.classes is None
    found = [image_metrics(m.flatten(), source.target(i).flatten()) for i, m in enumerate(made)]
    expected = card_of(place / "depth", "depth")["scores"][0]["metrics"]["rmse"]
    assert float(torch.stack(found).mean(0)[4]) == pytest.approx(expected, rel=1e-2)


def test_a_detector_is_used(place, tmp_path):
    """In pixels of each image, of any size; as what is scored."""
    model = ssl_vit.load_model(place / "detect")
    source, paths = images_of(place, "detect")
    found = model.predict(paths)
    expected = detect(model.module, source, model.view, Machine(CPU, torch.float32, 0, 8))
    assert max(len(one["boxes"]) for one in found) > 0
    for one, same in zip(found, expected.images, strict=True):
        torch.testing.assert_close(one["boxes"], same.boxes)
        torch.testing.assert_close(one["scores"], same.scores)
        assert torch.equal(one["labels"], same.classes)
        assert one["masks"].shape == (len(same.boxes), 48, 64)
        for mask, runs in zip(one["masks"], same.masks, strict=True):
            assert np.array_equal(mask, library.decode(runs))
    assert model.classes == NAMES
    (wide,) = model.predict(Image.open(paths[0]).resize((128, 96)))
    assert wide["boxes"][:, 2].max() > 64
    assert "detect, 2 classes, 3 channels of 64x64 pixels" in repr(model)


def test_what_cannot_be(place, tmp_path):
    """Each in a line."""
    card = str(place / "detect" / "detect.json")
    for flags, said in (
        (("--optim.lr", "1"), "again trains nothing: --optim.lr has no effect; allowed are"),
        (("more",), "usage: "),
        (("--data.val", "digits"), "objects are read from coco:"),
        (("--run.out", str(place / "detect")), "the run's own: give another"),
    ):
        with pytest.raises(UserError, match=said) as error:
            evaluate.main(["again", card, *flags])
        assert "\n" not in str(error.value)
    depths, masks = (str(place / kind / "finetune.json") for kind in ("depth", "segment"))
    for path, kind in ((depths, "segment"), (masks, "depth")):
        with pytest.raises(UserError, match=r"model.safetensors was trained on (pairs|depth):"):
            evaluate.main(["again", path, "--data.val", spec(place, kind, "val")])
    path = str(place / "classes/finetune.json")
    with pytest.raises(UserError, match=r"is a network of classes: --depth.scale has no effect"):
        evaluate.main(["again", path, "--depth.scale", "2"])
    with pytest.raises(UserError, match="both must have the same classes"):
        evaluate.main(["again", path, "--data.val", "digits:val"])
    for name, said in (
        ("nothing", "no such file, nor a run folder with"),
        ("encoder.safetensors", "not what finetune or detect leave; an encoder opens by"),
    ):
        with pytest.raises(UserError, match=said):
            ssl_vit.load_model(place / name)
    model = ssl_vit.load_model(place / "classes")
    with pytest.raises(UserError, match="image 0: the central crop holds no data"):
        model.predict(np.full((20, 20, 3), np.nan, np.float32))


def changed(path, target, change) -> None:
    """Copy a file of ours with other metadata."""
    from safetensors.torch import load_file

    from ssl_vit.weights.exchange import write_own
    from ssl_vit.weights.own_files import own_metadata

    content = own_metadata(path)
    change(content)
    write_own(target, load_file(path), content)


def test_files_that_are_not_what_they_say(place, tmp_path):
    """Of an earlier version, of another architecture, or such that would load other files."""
    detector, model = place / "detect" / DETECTOR_FILE, place / "classes" / MODEL_FILE
    target = tmp_path / "x.safetensors"
    changed(detector, target, lambda c: c["about"].pop("body"))
    with pytest.raises(UserError, match=r"an earlier version of ssl_vit.*; train it again"):
        open_tuned(target)
    changed(detector, target, lambda c: c["about"]["options"].update(width=24))
    with pytest.raises(UserError, match="tensors match"):
        open_tuned(target)
    changed(detector, target, lambda c: c["about"]["options"].update(width="x"))
    with pytest.raises(UserError, match="metadata of another version"):
        open_tuned(target)
    changed(model, target, lambda c: c["timm"]["kwargs"].update(checkpoint_path="/etc/passwd"))
    with pytest.raises(UserError, match="would make timm load other files"):
        open_tuned(target)
    changed(model, target, lambda c: c["timm"].update(arch="hf-hub:someone/something"))
    with pytest.raises(UserError, match="timm knows no network"):
        open_tuned(target)
    for gone in (["kind", "several", "setting"], ["several"]):
        changed(model, target, lambda c, gone=gone: [c["about"].pop(name) for name in gone])
        with pytest.raises(UserError, match=r"an earlier version of ssl_vit.*; train it again"):
            open_tuned(target)
    changed(model, target, lambda c: c["about"].update(kind=["classes"]))
    with pytest.raises(UserError, match="not what finetune or detect leave"):
        open_tuned(target)


# Narrow ones, of a block a stage: what is reopened is one as any other.
OTHERS = {
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1)},
}


def start_of(arch) -> Start:
    torch.manual_seed(0)
    module = timm.create_model(arch, num_classes=0, **OTHERS[arch]).eval()
    identity = {"given": arch, "arch_options": OTHERS[arch]}
    return Start(module, True, (64, 64), 3, (0.5,) * 3, (0.2,) * 3, identity, arch)


@pytest.mark.parametrize("arch", OTHERS)
@pytest.mark.parametrize("kind", ["segment", "depth", "detect", "detr"])
def test_other_networks_of_timm_are_reopened(arch, kind, tmp_path):
    """Of which some have a head of their own, with a norm as the mask transformer's."""
    view, start, path = View((64, 64), 3, (0.5,) * 3, (0.2,) * 3), start_of(arch), tmp_path / "x"
    if kind in ("detect", "detr"):
        head, masks = ("detr", False) if kind == "detr" else ("rcnn", True)
        options = DetectOptions(image_size=(64,), head=head, width=8)
        network = detector_of(start, options, 2, masks, 0)
        made = TunedDetector(network, view, ("a", "b"), masks, options)
    else:
        segment = SegmentKind(SegmentTuneConfig(head="transformer", blocks=4), ("a", "b"))
        of = segment if kind == "segment" else DepthKind(DepthTuneConfig(head="dpt"), 9.0)
        made = TunedPixels(dense_network(start, of, view.size, 0.1, 0), of, view)
    made.writer(path, start, 3)()
    found = open_tuned(path)
    assert found.kind == ("detect" if kind == "detr" else kind)
    assert found.view == view
    state, same = made.network.state_dict(), found.network.state_dict()
    assert state.keys() == same.keys()
    assert all(torch.equal(state[name], same[name]) for name in state)


def test_windows_are_reopened(place, tmp_path):
    """Attention within windows is no weight, and belongs to the network."""
    windows = ("--detect.windows", "3", "--detect.global-blocks", "1")
    options = [*arguments(place, "detect"), *OPTIONS["detect"], *windows]
    options[options.index("--run.out") + 1] = str(tmp_path)
    session = Detection(*detect_options(options))
    session.export(session.task)()
    found = open_tuned(tmp_path)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        session.task.eval()
        made, plain = session.task.network.backbone(images), found.network.eval().backbone(images)
    torch.testing.assert_close(made["0"], plain["0"])
    assert found.options.windows == 3
