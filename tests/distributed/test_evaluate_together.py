"""Two processes evaluate together: the same card as one alone, written once."""

import json

import pytest

from ssl_vit.benchmarks.scenes import open_studio, write_scenes
from tests.distributed.together import together
from tests.integration.conftest import Door
from tests.unit.evaluators.test_segment import textures

SETS = ("--data.train", "digits:train", "--data.val", "digits:val", "--data.workers", "0")


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """The encoder of an eight-step run."""
    door = Door(tmp_path_factory.mktemp("together"))
    result = door.pretrain("--run.out", "run", "--run.length", "8st")
    assert result.returncode == 0, result.stderr
    return door


# Rounding may differ with the size of a batch, and with it a vote or two.
@pytest.mark.parametrize(
    ("evaluator", "apart"),
    [
        (("knn", "--k", "5", "20"), 0.6),
        (("linear", "--protocol", "mae", "--epochs", "1"), 0.6),
        (("retrieval",), 0.02),
        (("attentive", "--epochs", "1"), 0.0),
    ],
    ids=lambda e: e[0] if isinstance(e, tuple) else "",
)
def test_two_processes_give_the_numbers_of_one(door, evaluator, apart):
    common = (*SETS, "--encoder", "run", "--precision", "fp32")
    made = []
    for world in (1, 2):
        door.env["SSL_VIT_CACHE"] = str(door.folder / f"cache-{world}")
        out = f"{evaluator[0]}-{world}.json"
        done = together(door, world, "-m", "ssl_vit.evaluate", *evaluator, *common, "--out", out)
        assert [d.returncode for d in done] == [0] * world, [d.stderr for d in done]
        spoken = "".join(d.stdout for d in done).count("protocol and scores")
        assert spoken == 1, "one process speaks"
        made.append(json.loads((door.folder / out).read_text()))
    one, two = made
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["scores"]) == len(two["scores"])
    for a, b in zip(one["scores"], two["scores"], strict=True):
        name = next(iter(a["metrics"]))
        assert b["metrics"][name] == pytest.approx(a["metrics"][name], abs=apart, rel=0)
        assert (a["features"], a["setting"]) == (b["features"], b["setting"])
    assert one["val"] == two["val"]


@pytest.mark.parametrize("evaluator", ["segment", "depth"])
def test_pixels_are_scored_once(door, evaluator):
    """Each process does the same, on its own device; one says so, and writes the card."""
    made = []
    for seed, part in enumerate(("a", "b")):
        folder = door.folder / f"{evaluator}-{part}"
        if evaluator == "segment":
            made.append(textures(folder, 12, seed, channels=1))
        else:
            write_scenes(open_studio("digits:val", "", 32, 2, seed), 12, folder, list("0123456789"))
            made.append(f"depth:{folder}")
    options = ("--encoder", "run", "--epochs", "1", "--data.workers", "0")
    argv = (evaluator, "--data.train", made[0], "--data.val", made[1], *options)
    scores = []
    for world in (1, 2):
        out = f"{evaluator}-{world}.json"
        done = together(door, world, "-m", "ssl_vit.evaluate", *argv, "--out", out)
        assert [d.returncode for d in done] == [0] * world, [d.stderr for d in done]
        assert "".join(d.stdout for d in done).count("protocol and scores") == 1
        warned = "".join(d.stderr for d in done).count(f"{evaluator} is for one process; all 2 do")
        assert warned == world - 1
        scores.append(json.loads((door.folder / out).read_text())["scores"])
    assert scores[0] == scores[1]
