"""Rows of two processes put together, and k-NN that two processes share."""

import pytest
import torch
from safetensors.torch import load_file

from ssl_vit.common.distributed import gather_rows, rank_and_world, share
from tests.distributed.together import together
from tests.integration.conftest import Door

SCRIPT = """
import os, sys, torch
from safetensors.torch import save_file
from ssl_vit.common.distributed import gather_rows, rank_and_world, share
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.knn import knn_predictions

torch.set_num_threads(1)
if "RANK" in os.environ:
    where, rank = f"file://{sys.argv[1]}/meeting", int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
rank, world = rank_and_world()
own = {"rank": torch.tensor([rank, world])}
for n in (0, 1, 7):
    part = share(n)
    own[f"share{n}"] = gather_rows(torch.arange(part.start, part.stop))
rows = torch.arange(6, dtype=torch.float64).view(3, 2) + 10 * rank
own["uneven"] = gather_rows(rows if rank else rows[:1])
own["none"] = gather_rows(rows if rank else rows[:0])
random = torch.Generator().manual_seed(0)
features, queries = (torch.randn(n, 8, generator=random) for n in (60, 31))
labels = torch.arange(60) % 7
several = (torch.randn(60, 3, generator=random) > 0).float()
for name, known in (("classes", labels), ("labels", several)):
    train = FeatureSet({"mean": features}, known, 0, torch.arange(60))
    val = FeatureSet({"mean": queries}, known[:31], 0, torch.arange(31))
    for how, judged in (("val", val), ("left", None)):
        for p in knn_predictions(train, judged, (1, 20), ("mean",), torch.device("cpu")):
            own[f"{name} {how} {p.setting}"] = p.guesses
save_file(own, f"{sys.argv[1]}/{rank}-of-{world}.safetensors")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What one process has, and each of two."""
    door = Door(tmp_path_factory.mktemp("gather"))
    (door.folder / "gather.py").write_text(SCRIPT)
    for world in (1, 2):
        done = together(door, world, "gather.py", str(door.folder))
        assert [d.returncode for d in done] == [0] * world, [d.stderr for d in done]
    return [
        load_file(door.folder / f"{name}.safetensors") for name in ("0-of-1", "0-of-2", "1-of-2")
    ]


def test_rows_of_different_numbers(found):
    _, first, second = found
    assert first["rank"].tolist() == [0, 2]
    assert second["rank"].tolist() == [1, 2]
    for own in (first, second):
        assert own["uneven"].tolist() == [[0, 1], [10, 11], [12, 13], [14, 15]]
        assert own["none"].tolist() == [[10, 11], [12, 13], [14, 15]]
        assert own["none"].dtype == torch.float64


def test_shares_are_all_of_it_in_order(found):
    for own in found:
        for n in (0, 1, 7):
            assert own[f"share{n}"].tolist() == list(range(n))


def test_shared_neighbours_are_those_of_one_process(found):
    one, first, second = found
    names = [name for name in one if " k=" in name]
    assert len(names) == 8
    for name in names:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], one[name], rtol=1e-5, atol=1e-6)


def test_alone_nothing_happens():
    rows = torch.ones(2, 3)
    assert gather_rows(rows) is rows
    assert rank_and_world() == (0, 1)
    assert share(5) == range(5)
