"""The depth probe by its door: a card that repeats, a picture, one line for each mistake."""

import json

import numpy as np
import pytest
from PIL import Image

from ssl_vit import evaluate
from ssl_vit.benchmarks.scenes import open_studio, write_scenes
from ssl_vit.common.errors import RunFailed, UserError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(open_studio("digits", "", 32, 2, 0), 16, root / "all", ["x"])
    return root / "all"


def test_depth_is_scored_and_can_be_done_again(scenes, tmp_path, capsys):
    out, spec = tmp_path / "x.json", f"depth:{scenes}"
    options = ("--data.train", spec, "--data.val", spec, "--data.workers", "0", "--out", str(out))
    argv = ["depth", "--encoder", "random:timm:vit_tiny_patch16_224", "--size", "32", *options]
    assert evaluate.main([*argv, "--scale", "0.001", "--epochs", "1"]) == 0
    card = json.loads(out.read_text())
    assert next(iter(card["scores"][0]["metrics"])) == "delta1"
    assert card["options"]["scale"] == 0.001
    assert card["train"]["depth_sha256"] == card["val"]["depth_sha256"]
    assert Image.open(tmp_path / "x-maps.png").size[0] > 4 * 96
    printed = capsys.readouterr().out
    assert "in % (rmse: the unit of depth) (log10: powers of ten)" in " ".join(printed.split())
    (tmp_path / "x-maps.png").unlink()
    assert evaluate.main(["again", str(out)]) == 0
    assert not (tmp_path / "x-maps.png").exists()
    first = scenes / "depth/000000.png"
    Image.fromarray(np.ones((32, 32), np.uint16)).save(first)
    with pytest.raises(RunFailed, match="train depth_sha256"):
        evaluate.main(["again", str(out)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--data.train is missing"),
        (("--data.train", "pairs:x", "--data.val", "x"), "'pairs:x' names no images with depth"),
        (("--data.held-out", "depth:x"), "--data.held-out is not for depth"),
        (("--data.labels", "x.csv"), "--data.labels is not for depth"),
    ],
)
def test_mistakes_get_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(["depth", "--encoder", "random:timm:vit_tiny_patch16_224", *options])
    assert "\n" not in str(error.value)
