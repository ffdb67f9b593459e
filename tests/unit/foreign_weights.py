"""What tests of other libraries' weights share: random ones, images, and how features agree."""

import argparse

import pytest
import timm
import torch

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.official import open_weights

TINY = {"img_size": 32, "patch_size": 8, "depth": 2}
TINY_CONFIG = EncoderConfig("vit_tiny_patch16_224", image_size=(32,), patch_size=8, depth=2)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
OPTIONS = argparse.Namespace(model="mae_vit_tiny", norm_pix_loss=True, betas=[0.9, 0.95])


def noisy(module, std=0.3, seed=0):
    """Every parameter random and large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter.data, std=std, generator=generator)
    return module.eval()


def vit(arch="vit_tiny_patch16_224", **kwargs):
    return noisy(timm.create_model(arch, **{**TINY, **kwargs}))


def images(size=(32, 32), channels=3):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def agree(opened, tokens, size=(32, 32), prefix=1):
    """Our features are ``tokens``; the weights make a difference between images and patches."""
    with torch.inference_mode():
        features = opened.encoder(images(size, opened.info.channels))
    assert not opened.encoder.training
    # Tokens without a final norm are larger, and so is what processors round differently.
    close = {"atol": 1e-5 * max(1.0, float(tokens.detach().abs().max())), "rtol": 1e-5}
    torch.testing.assert_close(features.cls, tokens[:, 0], **close)
    torch.testing.assert_close(features.patches, tokens[:, prefix:], **close)
    assert features.cls.std(0).max() > 1e-3
    # The configuration rebuilds this very architecture.
    again = Encoder(opened.info.config, opened.info.channels)
    again.vit.load_state_dict(opened.encoder.vit.state_dict(), strict=True)


def saved(content, tmp_path, name="weights.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def counted(opened):
    """The report's "n of n tensors", true of the encoder."""
    n = len(opened.encoder.vit.state_dict())
    return f"{n} of {n} tensors"


# Said of a network of TINY's sizes whose file does not tell its grid.
SQUARE = (
    "; a square grid of 4x4 patches is assumed; --encoder.image-size 16 64 (elsewhere --size, "
    "finetune: --tune.image-size) for another"
)


def refused(name, message):
    """In one line that says ``message``."""
    with pytest.raises(UserError, match=message) as caught:
        open_weights(name)
    assert "\n" not in str(caught.value)
