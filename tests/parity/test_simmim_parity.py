"""SimMIM against another implementation of it, that of Hugging Face, in float64, relative 1e-6."""

import pytest
import torch
from einops import rearrange

from ssl_vit.methods.simmim import SimMIM
from ssl_vit.model.execution import choose_attention
from ssl_vit.options.simmim import SimMIMConfig
from ssl_vit.weights.keymaps import to_timm
from ssl_vit.weights.official import open_weights
from tests.parity.golden import close
from tests.unit.foreign_weights import noisy

transformers = pytest.importorskip("transformers")

PATCH, SIZE = 4, 24


def in_our_order(outputs: torch.Tensor, channels: int) -> torch.Tensor:
    """Weights or biases of their decoder, a 1x1 convolution whose outputs are ordered (channel,
    row, column), as those of our linear layer: (row, column, channel)."""
    sizes = {"c": channels, "p": PATCH, "q": PATCH}
    ordered = rearrange(outputs.reshape(len(outputs), -1), "(c p q) i -> (p q c) i", **sizes)
    return ordered.squeeze(1) if outputs.ndim == 1 else ordered


class Case:
    """Their model, ours with its weights, and images masked in units as our workers draw them."""

    def __init__(self, folder, channels: int, width: int, depth: int, unit: int) -> None:
        config = transformers.ViTConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=4,
            intermediate_size=4 * width,
            image_size=SIZE,
            patch_size=PATCH,
            encoder_stride=PATCH,
            num_channels=channels,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            qkv_bias=True,
        )
        self.theirs = noisy(transformers.ViTForMaskedImageModeling(config)).double()
        self.theirs.save_pretrained(folder)
        self.channels = channels
        self.ours = self._ours(folder, SimMIMConfig(mask_unit=unit))
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(3, channels, SIZE, SIZE, generator=generator, dtype=torch.float64)
        self.masked = self.ours.drawn(torch.tensor([11, 12, 13]))["masked"]

    def _ours(self, folder, config: SimMIMConfig) -> SimMIM:
        """The encoder as it is read from their folder; decoder and mask token by hand."""
        opened = open_weights(folder)
        ours = SimMIM(config, opened.info.config, self.channels).double()
        choose_attention(ours, torch.device("cpu"))
        ours.encoder.vit.load_state_dict(opened.encoder.double().vit.state_dict(), strict=True)
        convolution = self.theirs.decoder[0].state_dict()
        own = {
            f"predict_pixels.{n}": in_our_order(p, self.channels) for n, p in convolution.items()
        }
        own["mask_token"] = self.theirs.vit.embeddings.mask_token[0, 0].detach()
        ours.objective.load_state_dict(own, strict=True)
        return ours.eval()

    def their_loss(self):
        """As they compute it, but for 1e-5 that they add to the number of masked pixels."""
        found = self.theirs(self.images, bool_masked_pos=self.masked)
        pixels = int(self.masked.sum()) * PATCH**2
        return found.loss * (pixels + 1e-5) / pixels, found.reconstruction

    def our_loss(self) -> torch.Tensor:
        return self.ours.objective.loss(self.ours.encoder, self.images, self.masked)


@pytest.fixture(
    scope="module",
    params=[(1, 32, 2, 2), (3, 48, 3, 3), (3, 32, 2, 1)],
    ids=lambda p: "channels {}, width {}, depth {}, unit {}".format(*p),
)
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("theirs"), *request.param)


def test_forward(case):
    """Loss, and the pixels that are predicted of all patches."""
    with torch.no_grad():
        expected, picture = case.their_loss()
        encoder = case.ours.encoder
        prediction = case.ours.objective.predict(encoder, case.images, case.masked)
        close(encoder.unpatchify(prediction, encoder.grid), picture, "reconstruction")
        close(case.our_loss().reshape(1), expected.reshape(1), "loss")
        masked = case.masked.sum(1)
    assert len(set(masked.tolist())) == 1
    assert 0 < int(masked[0]) < case.masked.shape[1]


def test_gradients(case):
    """Every gradient of theirs, the mask token's and the positions' among them, and no other."""
    case.ours.zero_grad()
    case.theirs.zero_grad()
    case.our_loss().backward()
    case.their_loss()[0].backward()
    ours = {n: p.grad for n, p in case.ours.named_parameters()}
    theirs = their_gradients(case)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        close(ours[name], expected, name)
        assert expected.abs().max() > 0, name


def their_gradients(case: Case) -> dict[str, torch.Tensor]:
    """By our names, in our shapes."""
    given = {n: p.grad for n, p in case.theirs.named_parameters()}
    encoder = to_timm("", given, "gradients", "vit").state
    found = {f"encoder.vit.{name}": value for name, value in encoder.items()}
    for kind in ("weight", "bias"):
        decoder = in_our_order(given[f"decoder.0.{kind}"], case.channels)
        found[f"objectives.simmim.predict_pixels.{kind}"] = decoder
    found["objectives.simmim.mask_token"] = given["vit.embeddings.mask_token"][0, 0]
    return found
