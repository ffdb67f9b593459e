"""The measuring door: reports that add up, and a user's mistakes in one line. Never a speed."""

import importlib.util
import json
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.benchmark import main
from ssl_vit.benchmarks import own_process
from ssl_vit.benchmarks.peers import library
from ssl_vit.common.errors import UserError
from tests.forks import SPAWNS

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
    """Tiny recipes, three photographs and a torn one, a folder of the torn one alone.

    What is measured has a process of its own, which starts at once; what it costs is not looked at.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_process, "multiprocessing", SPAWNS)
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


def installed(**needs):
    """Names of peers whose library there is, as --against wants them."""
    return ",".join(name for name, lib in needs.items() if importlib.util.find_spec(lib))


def measured(room, *arguments):
    """The report of a benchmark whose numbers are consistent."""
    assert main([*arguments, "--out", "report.json"]) == 0
    report = json.loads((room / "report.json").read_text())
    assert (report["benchmark"], report["method"]) == arguments[:2]
    hardware = report["hardware"]
    assert hardware["cpu"]
    assert hardware["cores"] >= 1
    assert hardware["memory_bytes"] > 2**28
    assert {"threads", "device", "gpu", "cuda", "driver"} <= set(hardware)
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["date"]
    sizes, options = report["sizes"], report["options"]
    assert sizes["crops"] == CROPS[arguments[1]]
    images = sizes["images"] if arguments[0] == "loader" else sizes["batch_size"]
    images *= options.get("steps", 1)
    for result in report["results"].values():
        rates, seconds = result["images_per_second_of_repeats"], result["seconds_of_repeats"]
        assert len(rates) == len(seconds) == options["repeats"]
        assert rates == pytest.approx([images / s for s in seconds], rel=1e-2)
        rate = images / statistics.median(seconds)
        assert result["images_per_second"] == pytest.approx(rate, rel=1e-2)
    for name, ratio in report["ratios"].items():
        above, below = (report["results"][n]["images_per_second"] for n in name.split(" / "))
        assert ratio == pytest.approx(above / below, rel=1e-2)
    return report


def whole(breakdown, *parts):
    """Whether the parts of a step are there, and their shares are all of it."""
    assert set(parts) <= set(breakdown["parts"])
    seconds, shares = zip(*(p.values() for p in breakdown["parts"].values()), strict=True)
    assert sum(seconds) == pytest.approx(breakdown["seconds"])
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("method", ["dino", "mae"])
def test_loader(room, capsys, method):
    options = ("--config", f"{method}.yaml", "--data.train", "flat:photos", "--repeats", "3")
    threads = torch.get_num_threads()
    peers = installed(original="PIL", **({"lightly": "lightly"} if method == "dino" else {}))
    report = measured(room, "loader", method, *options, "--against", peers)
    assert torch.get_num_threads() == threads
    assert report["hardware"]["threads"] == 1
    assert report["sizes"]["images"] == report["sizes"]["batch_size"] == 3
    assert report["sizes"]["unreadable"] == 1
    halves = ("workers", "device half on CPU", "workers + device half")
    assert set(report["results"]) == {*halves, *peers.split(",")}
    workers, device, both = (report["results"][n]["seconds_of_repeats"] for n in halves)
    assert both == pytest.approx([a + b for a, b in zip(workers, device, strict=True)], abs=1e-5)
    pairs = {f"{half} / {peer}" for half in halves[::2] for peer in peers.split(",")}
    assert set(report["ratios"]) == pairs
    said = capsys.readouterr().out
    assert "workers + device half / original" in said
    assert "report: report.json" in said


def test_loader_alone_with_few_images_in_small_batches(room):
    options = (
        "--data.train=digits:train",
        "--data.channels",
        "1",
        "--count",
        "7",
        "--batch-size",
        "3",
    )
    report = measured(room, "loader", "mae", "--config", "mae.yaml", *options, "--repeats", "1")
    assert report["sizes"]["images"] == 7
    assert report["sizes"]["batch_size"] == 3
    assert "original" not in report["results"]
    assert report["ratios"] == {}


PEERS = {
    "mae": installed(original="timm", **{"huggingface-fp32": "transformers"}),
    "dino": installed(lightly="lightly") or "original",
}


@pytest.mark.parametrize("method", ["dino", "mae"])
def test_step(room, capsys, method):
    options = ("--config", f"{method}.yaml", "--run.device", "cpu", "--run.precision", "bf16")
    sizes = ("--batch-size", "2", "--repeats", "2", "--warm-up", "0")
    report = measured(room, "step", method, *options, *sizes, "--against", PEERS[method])
    assert report["precision"] == "bfloat16"
    results, peak = report["results"], report["matmul_peak"]
    assert list(results) == ["ours", *PEERS[method].split(",")]
    for name, result in results.items():
        assert np.isfinite(result["last_loss"])
        rate = result["flops_per_image"] * result["images_per_second"]
        assert result["flops_per_second"] == pytest.approx(rate, rel=1e-2)
        share = result["flops_per_second"] / peak["flops_per_second"]
        assert result["share_of_peak"] == (None if name.endswith("-fp32") else share)
        assert result["peak_memory_bytes"] is None or result["peak_memory_bytes"] > 0
    parameters = {name: result["parameters"] for name, result in results.items()}
    # Those that are no part of ours: mask tokens that lightly does not use.
    assert parameters["ours"] + 32 * ("lightly" in results) == list(parameters.values())[1]
    assert len(peak["shape"]) == 3
    assert peak["flops_per_second"] == max(rate for *_, rate in peak["rates"])
    whole(report["breakdown"], "device augmentation", "forward", "backward")
    said = capsys.readouterr().out
    assert all(word in said for word in ("ours is", "GFLOP", "backward", "report.json"))


def test_step_against_an_earlier_one(room, capsys):
    sizes = ("--config", "mae.yaml", "--run.device", "cpu", "--batch-size", "2", "--repeats", "1")
    measured(room, "step", "mae", *sizes)
    again = ["step", "mae", *sizes, "--optim.clip", "1", "--baseline", "report.json"]
    assert main([*again, "--out", "again.json"]) == 0
    found = json.loads((room / "again.json").read_text())["baseline"]
    assert found["results"]["ours"]["ratio"] > 0
    assert found["differs"] == {"optim.clip": [0.0, 1.0]}
    assert "optim.clip" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"with other sizes.batch_size 2 \(now 3\);"):
        main([*again, "--batch-size", "3"])


def test_end_to_end(room, capsys):
    data = ("--data.train", "flat:photos", "--data.workers", "1", "--batch-size", "2")
    counts = ("--steps", "2", "--repeats", "2", "--warm-up", "0", "--run.device=cpu")
    options = ("--config", "dino.yaml", *data, *counts, "--against", "original")
    report = measured(room, "end-to-end", "dino", *options)
    assert list(report["results"]) == ["ours", "original"]
    sizes = report["sizes"]
    assert (sizes["images"], sizes["unreadable"], sizes["workers"]) == (3, 1, 1)
    for result in report["results"].values():
        seconds = [s / 2 for s in result["seconds_of_repeats"]]
        assert result["seconds_of_a_step"] == pytest.approx(statistics.median(seconds), rel=1e-2)
        assert 0 <= result["share_waiting_for_images"] < 1
        assert result["loader_images_per_second"] > 0
        assert result["step_images_per_second"] > 0
        assert result["bound"]
    whole(report["breakdown"], "waiting for images", "transfer", "forward")
    assert "bound by" in capsys.readouterr().out


def test_detection(room, capsys):
    """One table of all networks at each size; each is timed as often as asked for."""
    network = ("--encoder.image-size", "32", "--encoder.width", "16", "--encoder.heads", "2")
    blocks = ("--encoder.depth", "2", "--detect.global-blocks", "1", "--detect.windows", "2")
    heads = ("--detect.width", "8", "--detect.proposals", "8", "--objects", "2")
    counts = ("--sizes", "32", "64", "--batch-size", "2", "--repeats", "2", "--warm-up", "0")
    options = (*network, *blocks, *heads, *counts, "--run.device", "cpu", "--out", "report.json")
    assert main(["detection", *options]) == 0
    report = json.loads((room / "report.json").read_text())
    assert report["benchmark"] == "detection"
    assert report["versions"]["torchvision"]
    vit = "vit_small_patch16_224"
    networks = ["maskrcnn_resnet50_fpn", f"{vit}, all blocks global", f"{vit}, windows of 2"]
    rows = [(size, name) for size in (32, 64) for name in networks]
    assert [(r["size"], r["network"]) for r in report["results"]] == rows
    for result in report["results"]:
        seconds = result["seconds_of_repeats"]
        assert len(seconds) == 2
        rate = 2 / statistics.median(seconds)
        assert result["images_per_second"] == pytest.approx(rate, rel=1e-2)
        assert np.isfinite(result["last_loss"])
        assert result["peak_memory_bytes"] is None or result["peak_memory_bytes"] > 0
    said = capsys.readouterr().out
    assert "2 objects and masks, batches of 2" in said
    assert all(f"{size} px, {name}" in said for size, name in rows)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--sizes", "48", "60"), "--sizes is 60; it must be divisible by the patch size, 16"),
        (("--sizes", "16"), "--sizes is 16; it must be 32 or more"),
        (("--objects", "0"), "--objects is 0; it must be 1 or more"),
        (("--detect.windows", "0"), "--detect.windows is 0; it must be 1 or more"),
        (("--out", "report.txt"), "its name must end in .json"),
        (("--sizes", "64", "--detect.global-blocks", "13"), "the encoder has 12 blocks"),
    ],
)
def test_a_mistake_in_detection_is_one_line(room, flags, said):
    with pytest.raises(UserError) as caught:
        main(["detection", *flags])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_peers_library_that_is_missing_is_one_line():
    with pytest.raises(UserError, match=r"--against lightly needs nowhere.*'ssl_vit\[bench\]'"):
        library("lightly", "nowhere", "loss")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["bench"], ["'bench'", "step, loader, end-to-end, scale"]),
        (["loader", "dyno"], ["'dyno'", "dino"]),
        (["loader", "mae"], ["--data.train is missing"]),
        (["loader", "mae", "--data.train", "flat:missing"], ["missing"]),
        (["loader", "mae", "--data.train", "flat:torn"], ["torn", "can be read"]),
        (["loader", "mae", "--data.train", "flat:photos", "--count", "0"], ["--count is 0"]),
        (["loader", "mae", "--data.train", "flat:photos", "--repeats", "0"], ["--repeats is 0"]),
        (
            ["loader", "mae", "--data.train", "flat:photos", "--against", "lightly"],
            ["'lightly'", "loader mae", "original"],
        ),
        (
            ["loader", "mae", "--data.train", "flat:deep", "--against", "original"],
            ["8-bit images", "flat:deep"],
        ),
        (["loader", "mae", "--coutn", "3"], ["--coutn", "--count"]),
        (["step", "mae", "--against", "original,lihgtly"], ["'lihgtly'", "huggingface, "]),
        (
            ["step", "mae", "--against", "original", "--optim.name", "muon"],
            ["--optim.name is 'muon'", "adamw"],
        ),
        (["step", "dino", "--against", "moco"], ["'moco'", "original, timm, huggingface"]),
        (["step", "mae", "--dry-run"], ["--dry-run"]),
        (["loader", "mae", "--data", "flat:photos"], ["unknown option '--data'"]),
        (["step", "mae", "--precision", "bf16"], ["--precision", "--run.precision"]),
        (["end-to-end", "mae"], ["--data.train is missing"]),
        (["end-to-end", "mae", "--data.train", "flat:photos"], ["--batch-size is 8", "3 images"]),
        (["end-to-end", "mae", "--steps", "0"], ["--steps is 0"]),
        (["end-to-end", "dino", "--against", "lightly"], ["'lightly'", "original"]),
        (["step", "mae", "--batch-size", "0"], ["--batch-size is 0"]),
        (["step", "mae", "--warm-up", "-1"], ["--warm-up is -1"]),
        (["step", "mae", "--run.device", "cuda:99"], ["cuda:99"]),
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
    result = door("-m", "ssl_vit.benchmark", "loader", "mae", "--data.train", "flat:missing")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert not result.stdout
