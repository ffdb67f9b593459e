"""The notebook's way in: an encoder that takes images as they come."""

import contextlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import ssl_vit
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.data.view import View
from ssl_vit.evaluators.features import Machine, extract, pooled
from ssl_vit.model.attention import cls_attention_rows
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from tests.conftest import ROOT
from tests.unit.foreign_weights import saved, vit

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's encoder file, three photographs of different sizes, and a gray encoder."""
    folder = tmp_path_factory.mktemp("api")
    generator = np.random.default_rng(0)
    for channels, name in ((3, "run"), (1, "gray"), (5, "five")):
        torch.manual_seed(channels)
        config = EncoderConfig(
            "vit_tiny_patch16_224", image_size=(16, 24), patch_size=4, width=32, depth=2, heads=2
        )
        encoder = Encoder(config, channels)
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        mean, std = (MEAN + MEAN)[:channels], (STD + STD)[:channels]
        (folder / name).mkdir()
        info = EncoderInfo(config, channels, mean, std, "mae", 7)
        save_encoder(folder / name / "encoder.safetensors", encoder, info)
    (folder / "photos").mkdir()
    for i, (height, width) in enumerate([(40, 30), (16, 24), (50, 90)]):
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def paths(folder):
    return sorted((folder / "photos").iterdir())


def test_features_are_those_of_the_evaluators(folder, paths):
    """The same images by path give what ``evaluate`` reads from the folder."""
    from ssl_vit.data.sources import open_source

    encoder = ssl_vit.load_encoder(folder / "run")
    found = encoder.features(paths)
    source = open_source(f"flat:{folder / 'photos'}")
    view = View((16, 24), 3, MEAN, STD)
    machine = Machine(torch.device("cpu"), torch.float32, workers=0)
    expected = extract(pooled(encoder.module), source, view, machine)
    torch.testing.assert_close(found.cls, expected.parts["cls"])
    torch.testing.assert_close(found.pool("mean"), expected.parts["mean"])
    assert found.patches.shape == (3, 24, 32)
    assert found.grid == (4, 6)
    assert found.cls.std(0).max() > 1e-2  # the images make a difference


def test_every_kind_of_image_is_the_same_image(folder, paths):
    encoder = ssl_vit.load_encoder(folder / "run")
    expected = encoder.features(paths).cls
    opened = [Image.open(path) for path in paths]
    arrays = [np.asarray(image) for image in opened]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    for images in (
        [str(p) for p in paths],
        [p.read_bytes() for p in paths],
        opened,
        arrays,
        tensors,
    ):
        torch.testing.assert_close(encoder.features(images).cls, expected)
    for one in (paths[0], str(paths[0]), opened[0], arrays[0], tensors[0], tensors[0][None]):
        torch.testing.assert_close(encoder.features(one).cls, expected[:1])
    torch.testing.assert_close(
        encoder.features(tensors[1][None].repeat(70, 1, 1, 1)).cls[69:], expected[1:2]
    )


def test_the_transform_normalises(folder, paths):
    """Of an image of the encoder's own size nothing is left to do but that."""
    encoder = ssl_vit.load_encoder(folder / "run")
    pixels = np.asarray(Image.open(paths[1]))
    made = encoder.transform(paths[1])
    expected = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(made[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_another_size_and_other_weights(folder, paths, tmp_path):
    """Any weight file that ``evaluate`` takes, at any size that the patch divides."""
    large = ssl_vit.load_encoder(folder / "run", size=(32, 16)).features(paths)
    assert large.grid == (8, 4)
    model = vit(num_classes=0)
    encoder = ssl_vit.load_encoder(
        saved({"teacher": {f"backbone.{k}": v for k, v in model.state_dict().items()}}, tmp_path)
    )
    torch.testing.assert_close(
        encoder.features(paths).cls,
        model.forward_features(encoder.transform(paths))[:, 0],
        atol=1e-5,
        rtol=1e-5,
    )


def test_attention_is_that_of_the_last_block(folder, paths):
    encoder = ssl_vit.load_encoder(folder / "run")
    maps = encoder.attention(paths)
    rows = cls_attention_rows(encoder.module, encoder.transform(paths))
    assert maps.shape == (3, 2, 4, 6)
    torch.testing.assert_close(maps.flatten(2), rows[:, :, 1:])
    torch.testing.assert_close(maps.sum((2, 3)) + rows[:, :, 0], torch.ones(3, 2))


def test_gray_and_five_channels(folder, paths):
    assert ssl_vit.load_encoder(folder / "gray").features(paths).cls.shape == (3, 32)
    tiles = np.random.default_rng(0).normal(size=(2, 16, 24, 5)).astype(np.float32)
    assert ssl_vit.load_encoder(folder / "five").features(tiles).cls.shape == (2, 32)
    takes = r"image 0: has 4 channels; .*five takes images of 5"
    with pytest.raises(UserError, match=takes):
        ssl_vit.load_encoder(folder / "five").features(np.zeros((16, 24, 4), np.float32))


def test_pixels_without_data_are_the_mean(folder):
    """NaN, and what an array masks; an image of nothing else has no features."""
    encoder = ssl_vit.load_encoder(folder / "five")
    tile = np.random.default_rng(0).normal(size=(16, 24, 5)).astype(np.float32)
    holed = tile.copy()
    holed[:5, :, 1:] = np.nan
    masked = np.ma.masked_array(tile, mask=np.isnan(holed))
    found = encoder.transform([tile, holed, masked])
    assert torch.equal(found[1], found[2])
    assert torch.equal(found[1][:, 5:], found[0][:, 5:])
    assert torch.equal(found[1][1:, :5], torch.zeros(4, 5, 24))
    assert torch.equal(found[1][0], found[0][0])
    assert encoder.features(holed).patches.isfinite().all()
    with pytest.raises(UserError, match="image 0: the central crop holds no data"):
        encoder.features(tile * np.nan)


def test_mistakes_are_one_line(folder, paths, tmp_path):
    encoder = ssl_vit.load_encoder(folder / "run")
    broken = tmp_path / "broken.png"
    broken.write_bytes(paths[0].read_bytes()[:60])
    for wrong, said in (
        (tmp_path / "none.png", "none.png: No such file"),
        ([paths[0], broken], "broken.png: "),
        ([], "no image is given"),
        (torch.zeros(1, 1, 3, 16, 24), "2 to 4 dimensions, not 5"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            encoder.features(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        ssl_vit.load_encoder(tmp_path / "nothing")
    with pytest.raises(UserError, match="no plain ViT"):
        ssl_vit.load_encoder("random:timm:resnet18")


def test_the_lines_of_the_readme(folder, paths, tmp_path, monkeypatch):
    """As they stand there, with a run and two images of those names."""
    lines = (ROOT / "README.md").read_text().partition("**In a notebook:**")[2]
    code = lines.partition("```python\n")[2].partition("```")[0]
    assert "load_encoder" in code
    (tmp_path / "runs").mkdir()
    shutil.copytree(folder / "run", tmp_path / "runs" / "mae-digits")
    for path, name in zip(paths, ("a.png", "b.jpg"), strict=False):
        Image.open(path).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(code, found)
    assert found["vectors"].shape == (2, 32)
    assert found["features"].patches.shape == (2, 24, 32)
    assert found["maps"].shape == (1, 2, 4, 6)
    assert found["x"].shape == (1, 3, 16, 24)


def test_what_it_says_of_itself(folder):
    said = repr(ssl_vit.load_encoder(folder / "run"))
    assert "vit_tiny_patch16_224, 32 features, 3 channels of 16x24 pixels, patch 4" in said


def test_on_cuda_float32_means_it(folder, monkeypatch):
    """No device is there: the settings are made before the weights are moved to it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32
    try:
        for device, exact in (("cpu", False), ("cuda", True)):
            torch.backends.cudnn.allow_tf32 = True
            torch.backends.cuda.enable_cudnn_sdp(True)
            with contextlib.suppress(AssertionError, RuntimeError):
                ssl_vit.load_encoder(folder / "run", device=device)
            assert torch.backends.cudnn.allow_tf32 is not exact
            assert torch.backends.cuda.cudnn_sdp_enabled() is not exact
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_the_package_itself_imports_nothing():
    """Parts of it are used where the rest is not installed, and doors start quickly."""
    code = "import sys, ssl_vit; print('torch' in sys.modules, 'load_encoder' in dir(ssl_vit))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="nothing"):
        ssl_vit.nothing  # noqa: B018
