"""MAE against numbers recorded from the original implementation, in float64, relative 1e-6."""

import pytest
import torch

from ssl_vit.common.config import EncoderConfig
from ssl_vit.methods.mae import MAE
from ssl_vit.model.execution import choose_attention
from ssl_vit.options.mae import MAEConfig
from tests.parity.golden import check_there_are, close, golden_files, read_golden

FILES = golden_files("mae_*.safetensors")


def test_there_are_golden_files():
    check_there_are(FILES, "mae_*.safetensors")


def our_name(theirs: str) -> str:
    """The original's parameter name as ours."""
    renamed = {
        "mask_token": "objectives.mae.decoder.mask_token",
        "decoder_pos_embed": "objectives.mae.decoder.positions",
        "decoder_embed": "objectives.mae.decoder.embed",
        "decoder_blocks": "objectives.mae.decoder.blocks",
        "decoder_norm": "objectives.mae.decoder.norm",
        "decoder_pred": "objectives.mae.decoder.predict",
    }
    head, _, rest = theirs.partition(".")
    ours = renamed.get(head)
    return f"encoder.vit.{theirs}" if ours is None else f"{ours}.{rest}".rstrip(".")


class Case:
    """A golden file, and our model with its weights."""

    def __init__(self, path) -> None:
        self.config, self.tensors = read_golden(path)
        c = self.config
        size = c["img_size"] if isinstance(c["img_size"], list) else [c["img_size"]]
        encoder = EncoderConfig(
            arch="vit_tiny_patch16_224",
            image_size=tuple(size),
            patch_size=c["patch_size"],
            width=c["embed_dim"],
            depth=c["depth"],
            heads=c["num_heads"],
            positions="sincos",
        )
        method = MAEConfig(
            mask_ratio=c["mask_ratio"],
            normalize_target=c["norm_pix_loss"],
            decoder_width=c["decoder_embed_dim"],
            decoder_depth=c["decoder_depth"],
            decoder_heads=c["decoder_num_heads"],
        )
        self.model = MAE(method, encoder, c["in_chans"]).double()
        choose_attention(self.model, torch.device("cpu"))
        self.own_positions = (
            self.model.encoder.vit.pos_embed.detach().clone(),
            self.model.objective.decoder.positions.clone(),
        )
        self._load()
        self.images = self.tensors["images"].double()
        self.noise = self.tensors["noise"].double()

    def _load(self) -> None:
        """Every tensor of the file goes into the model, and the model has no other."""
        weights = {
            our_name(name.removeprefix("weights.")): value.double()
            for name, value in self.tensors.items()
            if name.startswith("weights.")
        }
        positions = weights.pop("objectives.mae.decoder.positions")
        self.model.objective.decoder.positions.copy_(positions[0, 1:])
        assert positions[0, 0].abs().max() == 0
        self.model.load_state_dict(weights, strict=True)


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def case(request):
    return Case(request.param)


def test_positions(case):
    """Our sine-cosine tables are the original's, which were stored in float32."""
    encoder, decoder = case.own_positions
    torch.testing.assert_close(
        encoder.float(), case.tensors["weights.pos_embed"].float(), rtol=0, atol=1e-7
    )
    expected = case.tensors["weights.decoder_pos_embed"][0, 1:].float()
    torch.testing.assert_close(decoder.float(), expected, rtol=0, atol=1e-7)


def test_forward(case):
    """Loss, predictions, mask, restoring order and the encoder's visible latents."""
    golden = case.tensors
    prediction, mask = case.model.objective.predict(case.model.encoder, case.images, case.noise)
    close(prediction, golden["pred"], "pred")
    assert torch.equal(mask.double(), golden["mask"].double())
    order = case.noise.argsort(dim=1, stable=True)
    assert torch.equal(order.argsort(dim=1), golden["ids_restore"].long())
    encoder, objective = case.model.encoder, case.model.objective
    latent = encoder.encode(encoder.embed(case.images, order[:, : objective.n_visible]))
    close(latent, golden["latent_visible"], "latent_visible")
    loss = objective.loss(encoder, case.images, case.noise)
    close(loss.reshape(1), golden["loss"].reshape(1), "loss")


def test_gradients(case):
    """Every gradient of the original's, and no other."""
    case.model.zero_grad()
    case.model.objective.loss(case.model.encoder, case.images, case.noise).backward()
    ours = {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
    theirs = {
        our_name(name.removeprefix("grads.")): value
        for name, value in case.tensors.items()
        if name.startswith("grads.")
    }
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        close(ours[name], expected, name)
