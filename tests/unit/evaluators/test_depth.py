"""The depth probe on scenes: it learns, repeats, takes networks of any kind, and refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.data.depths import open_depths
from ssl_vit.data.view import View
from ssl_vit.evaluators import depth as probe
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.evaluators.depth import depth_probe, fit_heads, warn_different_units
from ssl_vit.evaluators.depth_heads import LinearDepth
from ssl_vit.evaluators.depth_options import DepthOptions
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.map_material import MapExtractor, gather_maps
from ssl_vit.evaluators.maps import maps_of
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import EncoderInfo

MACHINE = Machine(torch.device("cpu"), torch.float32, 0, 16)
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "convnext_atto": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1)},
    "samvit_base_patch16": {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 2},
}


def vit(folder: Path, depth: int = 4) -> Backbone:
    """A small random ViT."""
    torch.manual_seed(0)
    options = {"width": 32, "depth": depth, "heads": 2, "patch_size": 8, "image_size": (64,)}
    config = EncoderConfig("vit_tiny_patch16_224", **options)
    info = EncoderInfo(config, 3, (0.5,) * 3, (0.25,) * 3)
    view = View((64, 64), 3, info.mean, info.std)
    return Backbone("some", Encoder(config).eval(), view, ("cls",), {}, folder, info)


def network(name: str, folder: Path) -> Backbone:
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=0, **NETWORKS[name]).eval()
    view = View((64, 64), 3, (0.5,) * 3, (0.25,) * 3)
    return Backbone(f"timm:{name}", module, view, ("pooled",), {}, folder)


def blocks(root: Path, n: int, seed: int) -> str:
    """Noisy squares of 16 pixels, the brighter the further away: depths of 0.4 to 2.2."""
    random = np.random.RandomState(seed)
    for folder in ("images", "depth"):
        (root / folder).mkdir(parents=True)
    for i in range(n):
        gray = np.kron(random.randint(40, 221, (4, 4)), np.ones((16, 16), int))
        noisy = np.clip(gray[..., None] + random.randint(-9, 10, (64, 64, 3)), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(root / f"images/{i}.png")
        Image.fromarray((10 * gray).astype(np.uint16)).save(root / f"depth/{i}.png")
    return f"depth:{root}"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("blocks")
    return blocks(root / "train", 40, 0), blocks(root / "val", 8, 1)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("small")
    return blocks(root / "train", 12, 0), blocks(root / "val", 2, 1)


def run(encoder: Backbone, train: str, val: str, seed: int = 0, **options):
    config = DepthOptions(**{"epochs": 4, "scale": 0.001, **options})
    pairs = [open_depths(spec, scale=config.scale) for spec in (train, val)]
    scores, card, picture = depth_probe(config, encoder, *pairs, MACHINE, seed)
    return scores[0], card, picture


@pytest.mark.parametrize(("head", "epochs", "rate"), [("linear", 12, 3e-2), ("dpt", 3, 3e-3)])
def test_depth_is_learned(tmp_path, data, head, epochs, rate, monkeypatch):
    """Better than the best constant by far; the picture has a row for each of six images."""
    monkeypatch.setattr(probe, "LEARNING_RATES", {head: (rate,)})
    score, card, picture = run(vit(tmp_path), *data, head=head, epochs=epochs)
    truth = torch.stack([open_depths(data[1], scale=0.001).target(i) for i in range(8)])
    ratios = [torch.maximum(c / truth, truth / c) for c in np.linspace(0.4, 2.2, 50)]
    constant = max(float((ratio < 1.25).float().mean()) for ratio in ratios)
    assert score.value == score.metrics["delta1"] > 100 * constant + 20
    assert score.interval[0] <= score.value <= score.interval[1]
    assert list(score.metrics)[3:] == ["abs_rel", "rmse", "log10"]
    assert card["pairs"] == {
        "train": 40,
        "train_unreadable": 0,
        "val": 8,
        "val_unreadable": 0,
        "val_empty": 0,
        "val_pixels": 8 * 64 * 64 - card["pairs"]["val_pixels_beyond"],
        "val_pixels_beyond": card["pairs"]["val_pixels_beyond"],
    }
    highest = max(float(open_depths(data[0], scale=1e-3).target(i).max()) for i in range(40))
    assert card["probe"]["max_depth"] == highest
    assert picture.shape[0] > 6 * 96


def test_a_probe_is_a_function_of_its_seed_and_of_maps_kept_or_not(tmp_path, small):
    encoder = vit(tmp_path)
    torch.manual_seed(5)
    a, *_ = run(encoder, *small, seed=3, epochs=1)
    torch.manual_seed(6)
    b, *_ = run(encoder, *small, seed=3, epochs=1)
    assert a == b
    anew, card, _ = run(encoder, *small, seed=3, epochs=1, cache_gb=0.0)
    assert not card["probe"]["maps_kept"]
    assert anew.metrics == pytest.approx(a.metrics, rel=2e-2)
    assert run(encoder, *small, seed=4, epochs=1)[0].details != a.details


def test_nothing_is_chosen_by_the_validation_maps(tmp_path, small):
    encoder, wrong = vit(tmp_path), blocks(tmp_path / "wrong", 2, 1)
    for file in (tmp_path / "wrong/depth").iterdir():
        Image.fromarray(2500 - np.array(Image.open(file))).save(file)
    true, false = (run(encoder, small[0], val, epochs=2)[0] for val in (small[1], wrong))
    assert false.details == true.details
    assert len(true.details["held_out_delta1_by_lr"]) == 4
    assert false.value != true.value


def test_heads_side_by_side_are_heads_one_by_one(tmp_path, data):
    extractor = MapExtractor(maps_of(vit(tmp_path), 1), vit(tmp_path).view, MACHINE)
    material = gather_maps(extractor, open_depths(data[0], scale=0.001), 1.0)
    rows, rates = torch.arange(40), (1e-3, 1e-2)
    flat = material.maps[0].double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(
        material.statistics[0][0].double(), flat.mean(1), atol=1e-5, rtol=1e-5
    )

    def make() -> LinearDepth:
        return LinearDepth((32,), 0.1, 7.0)

    together = fit_heads(make, material, rows, rates, 1, 0)
    for head, rate in zip(together, rates, strict=True):
        (alone,) = fit_heads(make, material, rows, (rate,), 1, 0)
        for a, b in zip(head.parameters(), alone.parameters(), strict=True):
            assert torch.equal(a, b)
    weights = [head.layers[0].weight for head in together]
    assert (weights[0] - weights[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("head", ["linear4", "dpt"])
def test_networks_of_any_kind_are_probed(tmp_path, small, name, head, monkeypatch):
    """All stages of a pyramid, or four blocks where there is one resolution."""
    monkeypatch.setattr(probe, "LEARNING_RATES", {head: (1e-3,)})
    monkeypatch.setattr(probe, "WARMUP", 0.0)
    score, card, _ = run(network(name, tmp_path), *small, head=head, epochs=1)
    strides = (16,) * 4 if "sam" in name else (4, 8, 16, 32)
    assert card["probe"]["map_strides"] == strides
    assert 0 < score.metrics["abs_rel"] < 200


def test_the_crop_and_the_range_say_what_is_scored(tmp_path, data):
    encoder = vit(tmp_path)
    _, card, _ = run(encoder, *data, epochs=1, crop="garg", max_depth=1.5)
    rows, columns = int(0.99189189 * 64) - int(0.40810811 * 64), 61 - 2
    pairs = card["pairs"]
    assert pairs["val_pixels"] + pairs["val_pixels_beyond"] == 8 * rows * columns
    assert card["probe"]["max_depth"] == 1.5
    assert pairs["val_pixels_beyond"] > 0


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_depth": 0.05}, r"train: no pixel of its depth maps has a depth from 0.001 to 0.05"),
        ({"min_depth": 90.0}, r"no pixel of its depth maps has a depth from 90; the greatest is"),
        ({"crop": "nyu"}, r"--crop nyu is for maps of 480 x 640 pixels; that of .* has 64 x 64"),
        ({"head": "dpt", "depth": 2}, "'some': 4 feature maps asked; the network has 2 blocks"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, data, options, message):
    encoder = vit(tmp_path, options.pop("depth", 4))
    with pytest.raises(UserError, match=message) as error:
        run(encoder, *data, epochs=1, **options)
    assert "\n" not in str(error.value)


def test_too_few_or_empty_maps_are_refused(tmp_path, data):
    encoder = vit(tmp_path)
    few = blocks(tmp_path / "few", 9, 2)
    with pytest.raises(UserError, match="has 9 readable pairs; a probe needs 10"):
        run(encoder, few, data[1])
    for file in (tmp_path / "few/depth").iterdir():
        Image.fromarray(np.zeros((64, 64), np.uint16)).save(file)
    with pytest.raises(
        UserError, match=r"few: no pixel of its depth maps has a depth from 0.001 to"
    ):
        run(encoder, data[0], few, epochs=1)
    for file in (tmp_path / "few/depth").iterdir():
        file.write_bytes(b"no map")
    with pytest.raises(UserError, match=r"no pair of .* can be read: .*depth map .*0\.png"):
        run(encoder, few, data[1])


def test_units_that_differ_are_told(tmp_path, small, caplog):
    other = blocks(tmp_path / "far", 4, 5)
    for file in (tmp_path / "far/depth").iterdir():
        values = np.load(file) if file.suffix == ".npy" else np.array(Image.open(file))
        file.unlink()
        np.save(file.with_suffix(".npy"), values.astype(np.float32) * 1000)
    warn_different_units(open_depths(small[0]), open_depths(small[1]))
    assert not caplog.text
    warn_different_units(open_depths(small[0]), open_depths(other))
    assert "one --scale is for both, which need one unit" in caplog.text


def test_the_first_metric_is_that_of_any_unit(tmp_path, small):
    """So that a comparison, which has no --scale, may have it in its table."""
    metres, millimetres = (
        run(vit(tmp_path), *small, seed=3, epochs=2, scale=scale)[0].metrics
        for scale in (1e-3, 1.0)
    )
    for name in ("delta1", "delta2", "abs_rel"):
        assert millimetres[name] == pytest.approx(metres[name], abs=0.2), name
    assert millimetres["rmse"] == pytest.approx(1000 * metres["rmse"], rel=1e-2)


def test_raw_pixels_have_no_maps(tmp_path, data):
    raw = dataclasses.replace(vit(tmp_path), module=None)
    with pytest.raises(UserError, match="raw pixels have no maps"):
        run(raw, *data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "--scale is 0; it must be above 0"),
        ({"min_depth": 0.0}, "--min-depth is 0; it must be above 0"),
        ({"max_depth": -1.0}, "--max-depth is -1; it must be 0 or more"),
        ({"max_depth": 1.0, "min_depth": 2.0}, "--max-depth is 1; it must be above --min-depth, 2"),
        ({"epochs": 0}, "--epochs is 0; it must be 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DepthOptions(**options)
