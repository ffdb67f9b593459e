"""Losses of a whole batch that two processes share: what one process has, gradients included."""

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.together import together
from tests.integration.conftest import Door

# As DDP does, gradients are averaged over processes. The second one's rows are partly padding.
SCRIPT = """
import os, sys, torch
from safetensors.torch import save_file
from ssl_vit.common.distributed import all_reduce_mean, rank_and_world
from ssl_vit.objectives.centering import Center
from ssl_vit.objectives.heads import projector
from ssl_vit.objectives.koleo import koleo, nearest_distances
from ssl_vit.objectives.sinkhorn import sinkhorn_knopp
from ssl_vit.objectives.targets import Targets

torch.set_num_threads(1)
if "RANK" in os.environ:
    where, rank = f"file://{sys.argv[1]}/meeting", int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
rank, world = rank_and_world()
random = torch.Generator().manual_seed(0)
features, logits = (torch.randn(8, n, generator=random).double() for n in (5, 6))
logits[4:] += 3
map = torch.randn(5, 5, generator=random).double().requires_grad_()
valid = torch.tensor([1, 1, 1, 1, 1, 0, 0, 1]).double()
features, logits, valid = (t.chunk(world)[rank] for t in (features, logits, valid))
loss = koleo(nearest_distances(features @ map))
loss.backward()
gradient, map.grad = all_reduce_mean(map.grad), None
groups = {}
for images in (2, 3, 4, 8):
    koleo(nearest_distances(features @ map, images)).backward()
    groups[f"groups{images}"], map.grad = all_reduce_mean(map.grad), None
torch.manual_seed(0)
head = projector([5, 7, 3]).double()
head(features).pow(3).mean().backward()
normed = all_reduce_mean(head[0].weight.grad)
center = Center(6, 0.5).double().train()
center(logits, valid)
center.update(torch.tensor(True))
made = Targets(6, "sinkhorn", 0.5)
own = {
    "koleo": loss.detach(),
    "gradient": gradient,
    "normed": normed,
    **groups,
    "targets": sinkhorn_knopp(logits, 3),
    "counted": sinkhorn_knopp(logits, 3, valid),
    "center": center.value,
    "left": made.health(sinkhorn_knopp(logits, 3, valid), 0.3 * valid)["unevenness"],
}
save_file({k: v.contiguous() for k, v in own.items()}, f"{sys.argv[1]}/{rank}-of-{world}")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What one process has, and each of two."""
    door = Door(tmp_path_factory.mktemp("losses"))
    (door.folder / "losses.py").write_text(SCRIPT)
    for world in (1, 2):
        done = together(door, world, "losses.py", str(door.folder))
        assert [d.returncode for d in done] == [0] * world, [d.stderr for d in done]
    return [load_file(door.folder / name) for name in ("0-of-1", "0-of-2", "1-of-2")]


GROUPS = [f"groups{images}" for images in (2, 3, 4, 8)]


@pytest.mark.parametrize("name", ["koleo", "gradient", "normed", "center", "left", *GROUPS])
def test_all_have_what_one_has(found, name):
    one, first, second = (own[name] for own in found)
    torch.testing.assert_close(first, one)
    torch.testing.assert_close(second, one)


def test_groups_are_apart(found):
    """One of all images is no group at all; smaller ones have other neighbours."""
    one = found[0]
    torch.testing.assert_close(one["groups8"], one["gradient"])
    assert not torch.allclose(one["groups4"], one["gradient"])


def test_what_sinkhorn_leaves_is_of_rows_that_count(found):
    """Little, of all processes together."""
    one = found[0]
    share = one["counted"].sum(0) / one["counted"].sum()
    torch.testing.assert_close(one["left"], (share - 1 / 6).clamp(min=0).sum())


@pytest.mark.parametrize("name", ["targets", "counted"])
def test_targets_are_of_all_rows(found, name):
    one, first, second = (own[name] for own in found)
    torch.testing.assert_close(torch.cat([first, second]), one)
    sums = torch.tensor([1, 1, 1, 1, 1, 0, 0, 1]) if name == "counted" else torch.ones(8)
    torch.testing.assert_close(one.sum(1), sums.double())
