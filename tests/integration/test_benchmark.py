"""The measuring door: reports that add up, and a user's mistakes in one line. Never a speed."""

import importlib.util
import json
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.benchmark import main
from ssl_vit.config import UserError

TINY = """
encoder: {arch: vit_tiny_patch16_224, image_size: [16], patch_size: 4, width: 16, depth: 1,
  heads: 1}
"""
METHOD = {
    "dino": "method: {prototypes: 24, head_width: 12, bottleneck: 8, local_crops: 2, "
    "local_size: [8]}\n",
    "mae": "method: {decoder_width: 8, decoder_depth: 1, decoder_heads: 1}\n",
}
CROPS = {
    "dino": [{"count": 1, "size": [16, 16]}] * 2 + [{"count": 2, "size": [8, 8]}],
    "mae": [{"count": 1, "size": [16, 16]}],
}


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Tiny recipes, three photographs and a torn one, a folder of the torn one alone."""
    monkeypatch.chdir(tmp_path)
    for name, method in METHOD.items():
        (tmp_path / f"{name}.yaml").write_text(TINY + method)
    rng = np.random.default_rng(0)
    for folder in ("photos", "torn", "deep"):
        (tmp_path / folder).mkdir()
    for i in range(3):
        array = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(array).save(f"photos/{i}.jpg")
        Image.fromarray(np.full((9, 9), i, dtype=np.uint16)).save(f"deep/{i}.png")
    whole = (tmp_path / "photos" / "0.jpg").read_bytes()
    for folder in ("photos", "torn"):
        (tmp_path / folder / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def measured(room, *arguments):
    """The report of a benchmark whose numbers are consistent."""
    assert main([*arguments, "--out", "report.json"]) == 0
    report = json.loads((room / "report.json").read_text())
    assert (report["benchmark"], report["method"]) == arguments[:2]
    assert report["hardware"]["cpu"]
    assert report["hardware"]["cores"] >= 1
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["sizes"]["crops"] == CROPS[arguments[1]]
    for result in report["results"].values():
        rates, seconds = result["images_per_second_of_repeats"], result["seconds_of_repeats"]
        images = report["sizes"].get("images", report["sizes"]["batch_size"])
        assert len(rates) == len(seconds) == report["options"]["repeats"]
        assert rates == pytest.approx([images / s for s in seconds], rel=1e-2)
        rate = images / statistics.median(seconds)
        assert result["images_per_second"] == pytest.approx(rate, rel=1e-2)
    for name, ratio in report["ratios"].items():
        above, below = (report["results"][n]["images_per_second"] for n in name.split(" / "))
        assert ratio == pytest.approx(above / below, rel=1e-2)
    return report


@pytest.mark.parametrize("method", ["dino", "mae"])
def test_loader(room, capsys, method):
    options = ("--config", f"{method}.yaml", "--data", "flat:photos", "--repeats", "3")
    threads = torch.get_num_threads()
    report = measured(room, "loader", method, *options, "--against", "original")
    assert torch.get_num_threads() == threads
    assert report["hardware"]["threads"] == 1
    assert report["sizes"]["images"] == report["sizes"]["batch_size"] == 3
    assert report["sizes"]["unreadable"] == 1
    halves = ("workers", "device half on CPU", "workers + device half")
    assert set(report["results"]) == {*halves, "original"}
    workers, device, both = (report["results"][n]["seconds_of_repeats"] for n in halves)
    assert both == pytest.approx([a + b for a, b in zip(workers, device, strict=True)], abs=1e-5)
    assert set(report["ratios"]) == {"workers / original", "workers + device half / original"}
    said = capsys.readouterr().out
    assert "workers + device half / original" in said
    assert "report: report.json" in said


def test_loader_alone_with_few_images_in_small_batches(room):
    options = ("--data=digits:train", "--data.channels", "1", "--images", "7", "--batch-size", "3")
    report = measured(room, "loader", "mae", "--config", "mae.yaml", *options, "--repeats", "1")
    assert report["sizes"]["images"] == 7
    assert report["sizes"]["batch_size"] == 3
    assert "original" not in report["results"]
    assert report["ratios"] == {}


@pytest.mark.parametrize("method", ["dino", "mae"])
def test_step(room, method):
    options = ("--config", f"{method}.yaml", "--device", "cpu", "--precision", "fp32")
    sizes = ("--batch-size", "2", "--repeats", "2", "--warm-up", "0")
    report = measured(room, "step", method, *options, *sizes)
    assert report["precision"] == "float32"
    assert report["sizes"]["batch_size"] == 2
    assert set(report["results"]) == {"ours"}
    assert np.isfinite(report["last_loss"]["ours"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("against", ["lightly", "lightly-grouped"])
def test_step_against_lightly(room, against):
    if importlib.util.find_spec("lightly") is None:
        with pytest.raises(UserError, match=r"needs lightly.*pip install 'ssl_vit\[bench\]'"):
            main(["step", "dino", "--config", "dino.yaml", "--against", against])
        return
    options = ("--config", "dino.yaml", "--batch-size", "2", "--repeats", "2")
    report = measured(room, "step", "dino", *options, "--against", against)
    assert set(report["results"]) == {"ours", against}
    parameters = report["sizes"]["parameters"]
    assert parameters["ours"] == parameters[against] - 2 * 16  # its unused mask tokens


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["bench"], ["'bench'", "loader, step"]),
        (["loader", "dyno"], ["'dyno'", "dino"]),
        (["loader", "mae"], ["--data is missing"]),
        (["loader", "mae", "--data", "flat:missing"], ["missing"]),
        (["loader", "mae", "--data", "flat:torn"], ["torn", "can be read"]),
        (["loader", "mae", "--data", "flat:photos", "--images", "0"], ["--images is 0"]),
        (["loader", "mae", "--data", "flat:photos", "--repeats", "0"], ["--repeats is 0"]),
        (["loader", "mae", "--data", "flat:photos", "--against", "timm"], ["--against"]),
        (
            ["loader", "mae", "--data", "flat:deep", "--against", "original"],
            ["8-bit images", "flat:deep"],
        ),
        (["loader", "mae", "--imagse", "3"], ["--imagse", "--images"]),
        (["step", "mae", "--against", "lightly"], ["for dino", "mae"]),
        (["step", "mae", "--batch-size", "0"], ["--batch-size is 0"]),
        (["step", "mae", "--warm-up", "-1"], ["--warm-up is -1"]),
        (["step", "mae", "--device", "cuda:99"], ["cuda:99"]),
        (["step", "mae", "--out", "report.txt"], ["report.txt", ".json"]),
        (["step", "mae", "--out", "no/where.json"], ["no folder", "'no'"]),
        (["step", "mae", "--config", "mae_cifr10"], ["mae_cifar10"]),
        (["step", "dino", "--encoder.image-size", "18"], ["18", "patch size"]),
    ],
)
def test_a_mistake_is_one_line(room, arguments, fragments):
    if len(arguments) > 2 and "--config" not in arguments:
        arguments = [*arguments, "--config", f"{arguments[1]}.yaml"]
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert not list(room.glob("report*"))


def test_a_mistake_ends_with_status_2(door):
    result = door("-m", "ssl_vit.benchmark", "loader", "mae", "--data", "flat:missing")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert not result.stdout
