"""The embedding door, in this process: what it writes, where it goes on, and what it refuses."""

import gc
import json
import logging
from pathlib import Path

import numpy as np
import pandas
import pytest
import tifffile
import torch
from PIL import Image

import ssl_vit
from ssl_vit import embed
from ssl_vit.commands import embed_features, embedding
from ssl_vit.commands.eval_options import EvalData, FeatureConfig
from ssl_vit.commands.evaluating import Evaluation
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.data.batch import Batch
from ssl_vit.evaluators.feature_parts import Layout, Parts
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.run_lock import RunLock
from ssl_vit.weights.exchange import EncoderInfo, save_encoder

CONFIG = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(8,), patch_size=2, width=32, depth=4, heads=2
)
QUICK = ("--data.workers", "0", "--device", "cpu", "--precision", "fp32", "--batch-size", "16")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders of gray images, of another one's weights, and of 5 channels of 16 bits."""
    folder = tmp_path_factory.mktemp("encoders")
    for seed, (name, channels) in enumerate((("run", 1), ("other", 1), ("five", 5))):
        torch.manual_seed(seed)
        info = EncoderInfo(CONFIG, channels, (0.3,) * channels, (0.35,) * channels, "mae", 3)
        (folder / name).mkdir()
        save_encoder(folder / name / "encoder.safetensors", Encoder(CONFIG, channels), info)
    return folder


@pytest.fixture
def here(encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that calls are made in: the encoders, and ``images``, in two classes, of which one
    cannot be read."""
    monkeypatch.chdir(tmp_path)
    for run in encoders.iterdir():
        (tmp_path / run.name).symlink_to(run)
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 256, (12, 10), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i:02d}.png")
    (tmp_path / "images" / "a" / "07.png").write_bytes(b"no image")
    return tmp_path


def call(*options: str, out: str = "x.npz", encoder: str = "run") -> None:
    asked = ("--encoder", encoder, "--data.train", "folder:images", "--out", out)
    assert embed.main([*asked, *QUICK, *options]) == 0


def opened(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def test_features_are_those_of_the_evaluators(here, monkeypatch):
    monkeypatch.setenv("SSL_VIT_CACHE", str(here / "cache"))
    call("--features", "mean", "cls4+mean", "patches")
    made = opened("x.npz")
    config = FeatureConfig(
        data=EvalData(train="folder:images", workers=0),
        encoder="run",
        device="cpu",
        precision="fp32",
        batch_size=16,
    )
    wanted = Evaluation(config, needs_val=False).features("train")
    for name in ("mean", "cls4+mean"):
        np.testing.assert_array_equal(made[name], wanted.feature(name))
    assert made["labels"].tolist() == wanted.labels.tolist() == 19 * [0] + 20 * [1]
    encoder = ssl_vit.load_encoder("run", device="cpu")
    found = encoder.features(made["names"].tolist())
    np.testing.assert_allclose(made["patches"], found.patches, atol=1e-5)
    assert json.loads(str(made["card"]))["grid"] == list(found.grid) == [4, 4]


def test_the_lines_of_the_readme(here):
    call()
    f = np.load("x.npz")
    assert f["cls"].shape == f["mean"].shape == (39, 32)
    assert f["names"][0] == str(here / "images" / "a" / "00.png")
    assert f["classes"][f["labels"]].tolist() == 19 * ["a"] + 20 * ["b"]


def test_an_image_that_cannot_be_read_is_left_out_and_named(here, caplog, capsys):
    with caplog.at_level(logging.INFO):
        call()
    bad = str(here / "images" / "a" / "07.png")
    assert f"unreadable image left out: {bad}: " in caplog.text
    assert "39 images, 1 left out as unreadable" in capsys.readouterr().out
    made = opened("x.npz")
    card = json.loads(str(made["card"]))
    assert len(made["names"]) == card["rows"] == 39
    assert bad not in made["names"]
    assert card["unreadable"] == [f"{bad}: UnidentifiedImageError: cannot identify image file"]


def test_the_card_says_how_the_features_were_made(here):
    call("--features", "cls")
    card = json.loads(str(opened("x.npz")["card"]))
    assert card["encoder"]["mean"] == [0.3]
    assert len(card["encoder"]["weights_sha256"]) == 64
    assert card["transform"]["size"] == [8, 8]
    assert card["data"]["source"] == "folder:images"
    assert card["data"]["images"] == 40
    assert card["features"] == {"cls": [32]}
    assert card["versions"]["ssl_vit"] == ssl_vit.__version__
    assert (card["precision"], card["device"], card["batch_size"]) == ("float32", "cpu", 16)


def test_images_of_many_channels_and_16_bits_without_labels(here):
    (here / "flat").mkdir()
    random = np.random.default_rng(0)
    for i in range(5):
        pixels = random.integers(0, 65535, (10, 9, 5), np.uint16)
        tifffile.imwrite(here / "flat" / f"{i}.tif", pixels, photometric="minisblack")
    out = ("--encoder", "five", "--data.train", "flat:flat", "--out", "x.parquet")
    assert embed.main([*out, *QUICK, "--data.nodata", "0"]) == 0
    frame = pandas.read_parquet("x.parquet")
    assert list(frame) == ["name", "cls", "mean"]
    vectors = np.stack(frame["cls"])
    assert np.isfinite(vectors).all()
    assert len(np.unique(vectors, axis=0)) == 5


def test_labels_of_a_table_come_along(here):
    (here / "labels.csv").write_text("image,grade\na/00,low\nb/01,high\n")
    call("--data.labels", "labels.csv", out="x.npy")
    frame = pandas.read_csv("x.npy.csv")
    assert frame["class"].dropna().tolist() == ["low", "high"]
    # and the file beside the array is such a table
    call("--data.labels", "x.npy.csv", "--data.label-column", "class", out="y.npz")
    made = opened("y.npz")
    assert made["classes"].tolist() == ["high", "low"]
    assert made["labels"].tolist().count(-1) == 37


def test_another_network_has_one_feature(here):
    call("--size", "32", encoder="random:timm:resnet10t")
    made = opened("x.npz")
    assert made["pooled"].shape == (39, 512)
    call(out="y.npz", encoder="pixels:run")
    assert opened("y.npz")["pixels"].shape == (39, 64)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_workers_change_nothing(here, workers):
    call(out="x.npz")
    call("--data.workers", workers, out="y.npz")
    assert Path("x.npz").read_bytes() == Path("y.npz").read_bytes()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_images_are_let_go_before_a_part_is_whole(here, workers, monkeypatch):
    """They are far larger than features, and the workers' memory has room for few batches."""
    monkeypatch.setattr(Layout, "part_size", 16)
    real, alive = Parts.write, []

    def write(self: Parts, part: int, rows: object) -> None:
        alive.append(sum(type(o) is Batch for o in gc.get_objects()))
        real(self, part, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(Parts, "write", write)
    call("--batch-size", "2", "--data.workers", workers)
    assert len(alive) == 3
    assert max(alive) <= 3


@pytest.fixture
def stopped(here, monkeypatch):
    """Calls that fail once so many parts (of 16 images, 3 in all) are written."""

    def after(parts: int, *options: str, out: str = "x.npz", encoder: str = "run") -> None:
        real, left = Parts.write, iter(range(parts))

        def write(self: Parts, *given: object) -> None:
            if next(left, None) is None:
                raise OSError("the disk is full")
            real(self, *given)  # type: ignore[arg-type]

        with monkeypatch.context() as patched:
            patched.setattr(Parts, "write", write)
            with pytest.raises(OSError, match="full"):
                call(*options, out=out, encoder=encoder)

    return after


def test_what_is_there_is_not_computed_again(stopped, caplog, monkeypatch):
    stopped(2)
    assert not Path("x.npz").exists()
    real, made = Parts.write, []
    monkeypatch.setattr(Parts, "write", lambda s, n, rows: (made.append(n), real(s, n, rows))[1])
    with caplog.at_level(logging.INFO):
        call()
    assert made == [2]
    assert "x.npz.partial: goes on after 32 images" in caplog.text
    assert not Path("x.npz.partial").exists()
    call(out="y.npz")
    assert Path("x.npz").read_bytes() == Path("y.npz").read_bytes()
    with caplog.at_level(logging.INFO):
        call()
    assert len(made) == 4  # and the file is there


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--encoder", "other"), r"of another encoder: encoder \w+ was \w+, and is \w+ now"),
        (("--data.train", "folder:images/.."), "of other images or labels: data source was"),
        (("--features", "cls"), "of other options or versions: features mean"),
        (
            ("--precision", "bf16"),
            "of other options or versions: precision was float32, and",
        ),
        (("--batch-size", "8"), "of other options or versions: batch_size was 16, and is 8 now"),
    ],
)
def test_parts_of_something_else_are_refused(stopped, change, said):
    stopped(1)
    left = sorted(Path("x.npz.partial").iterdir())
    remedy = "give another --out, or --resume never to begin anew"
    with pytest.raises(UserError, match=rf"^x\.npz\.partial is {said}.*; {remedy}$"):
        call(*change)
    assert sorted(Path("x.npz.partial").iterdir()) == left
    call(*change, "--resume", "never")
    assert opened("x.npz")["cls"].shape == (39, 32)
    assert not Path("x.npz.partial").exists()


def test_where_shards_are_kept_is_nothing_else(stopped):
    """On another machine, on another disk, a call goes on."""
    stopped(1, "--data.shard-cache", "one")
    call("--data.shard-cache", "two", "--data.shard-cache-size", "5", "--data.cache-reserve", "1")
    assert opened("x.npz")["cls"].shape == (39, 32)


def test_images_that_changed_are_noticed(stopped):
    stopped(1)
    Image.new("L", (9, 9)).save("images/b/03.png")
    with pytest.raises(UserError, match="other images or labels: data fingerprint was"):
        call()


def test_a_finished_file_is_not_replaced_unasked(here, capsys, stopped):
    call()
    before = Path("x.npz").read_bytes()
    call()
    assert "nothing to do: x.npz is there" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^x.npz is of another encoder: .* --resume never"):
        call(encoder="other")
    assert Path("x.npz").read_bytes() == before
    stopped(1, "--resume", "never", encoder="other")
    assert Path("x.npz").read_bytes() == before
    call(encoder="other")  # which goes on with what was asked for
    assert Path("x.npz").read_bytes() != before
    assert not Path("x.npz.partial").exists()


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_file_of_somebody_else_is_never_replaced(here, resume):
    np.savez("x.npz", precious=np.ones(3))
    with pytest.raises(UserError, match=r"'x\.npz', a file that embed has not written"):
        call("--resume", resume)
    assert list(np.load("x.npz")) == ["precious"]
    assert not Path("x.npz.partial").exists()


def test_two_calls_do_not_write_one_file(here):
    lock = RunLock(here / "x.npz.partial")
    try:
        with pytest.raises(UserError, match=r"in use by another run: .*Give another --out, or"):
            call()
    finally:
        lock.release()
    call()


def test_a_part_that_is_gone_is_said(here, monkeypatch):
    """As on machines that share no disk."""
    monkeypatch.setattr(Parts, "write", lambda *_: None)
    with pytest.raises(RunFailed, match=r"3 of 3 parts are not in x\.npz\.partial: it must be on"):
        call()
    assert not Path("x.npz").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--out", "x.csv"), "'x.csv'; its name must end in .npz, .parquet, .npy"),
        (("--out", ""), "--out is missing"),
        (("--out", "gone/x.npz"), "there is no folder '.*gone'"),
        (("--out", "folder.npz"), "a folder; name a file"),
        (("--encoder", ""), "--encoder is missing"),
        (("--encoder", "gone"), "'gone'"),
        (("--data.train", ""), "--data.train is missing"),
        (("--data.train", "folder:gone"), "'gone' does not exist"),
        (("--features", "clss"), r"--features has \['clss'\]; allowed: cls, mean, patches"),
        (("--features", "pooled"), r"\['pooled'\]; run has cls, mean, .*patches"),
        (("--features", "cls", "mean", "--out", "x.npy"), "a .npy file holds one array"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--encoder", "five", "--data.train", "digits"), "have 1 channel; --encoder five takes"),
        (("--resume", "maybe"), "--resume"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(here, change, said):
    (here / "folder.npz").mkdir()
    before = sorted(here.rglob("*"))
    with pytest.raises(UserError, match=said) as error:
        call(*change)
    assert "\n" not in str(error.value)
    assert sorted(here.rglob("*")) == before


def test_a_full_disk_is_foreseen(here, caplog, monkeypatch):
    usage = embedding.shutil.disk_usage(here)._replace(free=1000)
    monkeypatch.setattr(embedding.shutil, "disk_usage", lambda path: usage)
    call()
    assert "warning: x.npz needs up to 0.0 MB while it is put together" in caplog.text


def test_only_what_is_asked_for_is_computed(here):
    from ssl_vit.evaluators.backbone import open_backbone

    backbone = open_backbone("run", 0)
    images = torch.zeros(2, 1, 8, 8)
    made = embed_features.embedding_of(backbone, ("patches",))(images)
    assert {name: tuple(rows.shape) for name, rows in made.items()} == {"patches": (2, 16, 32)}
