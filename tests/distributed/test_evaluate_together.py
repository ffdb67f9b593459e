"""Two processes evaluate together: the same card as one alone, written once."""

import json

import pytest

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


@pytest.mark.parametrize(
    "evaluator",
    [
        ("knn", "--k", "5", "20"),
        ("linear", "--protocol", "mae", "--epochs", "1"),
    ],
    ids=lambda e: e[0],
)
def test_two_processes_give_the_numbers_of_one(door, evaluator):
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
        # Rounding may differ with the size of a batch, and with it a vote or two.
        assert b["metrics"]["top1"] == pytest.approx(a["metrics"]["top1"], abs=0.6)
        assert (a["features"], a["setting"]) == (b["features"], b["setting"])
    assert one["val"] == two["val"]


def test_segmentation_is_scored_once(door):
    """Each process does the same, on its own device; one says so, and writes the card."""
    made = [textures(door.folder / name, 12, seed, channels=1) for seed, name in enumerate("ab")]
    options = ("--encoder", "pixels:run", "--epochs", "1", "--data.workers", "0")
    argv = ("segment", "--data.train", made[0], "--data.val", made[1], *options)
    done = together(door, 2, "-m", "ssl_vit.evaluate", *argv, "--out", "segment.json")
    assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
    assert "".join(d.stdout for d in done).count("protocol and scores") == 1
    assert "".join(d.stderr for d in done).count("segment is for one process; all 2 do") == 1
