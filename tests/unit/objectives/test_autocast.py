"""Within autocast sums of targets and of logits keep the precision of what is summed."""

import pytest
import torch

from ssl_vit.objectives.centering import Center
from ssl_vit.objectives.targets import Targets


def outputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def of_center() -> dict[str, torch.Tensor]:
    center = Center(64, 0.9).train()
    center.note(outputs(30, 64), torch.linspace(0, 1, 30))
    center.update(torch.tensor(True))
    return {"center": center.value}


def of_targets() -> dict[str, torch.Tensor]:
    targets = Targets(64, "sinkhorn", 0.9)
    return targets.health(targets(outputs(30, 64), 0.5), torch.linspace(0, 1, 30))


@pytest.mark.parametrize("made", [of_center, of_targets])
def test_nothing_is_rounded(made):
    expected = made()
    with torch.autocast("cpu", torch.bfloat16):
        assert (outputs(2, 2) @ outputs(2, 2)).dtype == torch.bfloat16
        found = made()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
