"""LeJEPA: what its loss has no gradient of is not trained."""

import pytest
import torch

from ssl_vit.common.config import EncoderConfig
from ssl_vit.methods.lejepa import LeJEPA
from ssl_vit.model.attention import cls_features
from ssl_vit.options.lejepa import LeJEPAConfig

ENCODER = EncoderConfig(
    "vit_tiny_patch16_224", image_size=(16,), patch_size=4, width=24, depth=1, heads=2
)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_every_weight_that_is_trained_has_a_gradient(norm):
    """A shift of all [CLS] is taken away by a batch norm, as is a bias before it."""
    method = LeJEPA(LeJEPAConfig(head_width=16, outputs=8, head_norm=norm), ENCODER, 1).double()
    images = torch.randn(12, 1, 16, 16, dtype=torch.double)
    seen = cls_features(method.encoder, images)
    method.objective.head(seen).pow(3).mean().backward()
    fixed = {name for name, p in method.named_parameters() if not p.requires_grad}
    assert fixed == ({"encoder.vit.norm.bias"} if norm == "batch" else set())
    grads = [p.grad.norm() for p in method.parameters() if p.requires_grad]
    assert min(grads) > 1e-12 * max(grads)
