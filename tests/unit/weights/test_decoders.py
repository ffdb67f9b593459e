"""Whole MAEs from runs and others' files: their predictions, and which target they have."""

import argparse
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ssl_vit.commands.pretrain_options import PretrainConfig
from ssl_vit.commands.reconstruction import (
    mask_keys,
    open_reconstruction,
    reconstruction_panel,
)
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.layers import to_yaml
from ssl_vit.common.reading import DataConfig
from ssl_vit.data.normalize import Normalize
from ssl_vit.evaluators.backbone import open_backbone
from ssl_vit.methods.mae import MAE, MAEObjective
from ssl_vit.objectives.masked_patches import explained_shares, patch_statistics
from ssl_vit.options.mae import MAEConfig
from ssl_vit.weights.decoders import read_decoder
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from tests.unit.foreign_weights import HALF, images, noisy, saved, vit

WIDTH, PIXELS, N = 64, 8 * 8 * 3, 16
SMALL = EncoderConfig(
    "vit_tiny_patch16_224",
    image_size=(16, 24),
    patch_size=8,
    width=24,
    depth=2,
    heads=2,
    positions="sincos",
)


def noise(n=N):
    return torch.rand(2, n, generator=torch.Generator().manual_seed(3))


def opened(name, size=None):
    backbone = open_backbone(str(name), 0)
    return open_reconstruction(backbone, size or backbone.view.size)


def predicted(mae, x, order_noise, ratio=0.0):
    visible = mae.config.visible(order_noise.shape[1], ratio)
    return mae.objective.predict(mae.encoder, x, order_noise, visible)


# -- the official files


def official_state(width=WIDTH, seed=5):
    """An encoder of timm's, and all of a pretraining file's names around it."""
    model = vit(num_classes=0)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return 0.3 * torch.randn(shape, generator=generator)

    with torch.no_grad():
        model.pos_embed[:, 0] = 0
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["mask_token"] = random(1, 1, width)
    state["decoder_pos_embed"] = F.pad(random(1, N, width), (0, 0, 1, 0))
    layers = {"decoder_embed": (width, 192), "decoder_pred": (PIXELS, width)}
    norms = ["decoder_norm"]
    for i in range(2):
        block = f"decoder_blocks.{i}."
        norms += [block + "norm1", block + "norm2"]
        layers |= {block + "attn.qkv": (3 * width, width), block + "attn.proj": (width, width)}
        layers |= {block + "mlp.fc1": (4 * width, width), block + "mlp.fc2": (width, 4 * width)}
    for name, shape in layers.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = random(*shape), random(shape[0])
    for name in norms:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + random(width), random(width)
    return model, state


def official_names(start):
    return [name for name in official_state()[1] if name.startswith(start)]


def original_prediction(model, state, x, order_noise, visible):
    """The original's two halves as its paper and appendix say, step by step, with its names."""
    order = order_noise.argsort(dim=1)
    restore = order.argsort(dim=1)
    keep = order[:, :visible, None].expand(-1, -1, 192)
    tokens = model.patch_embed(x) + model.pos_embed[:, 1:]
    cls = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
    latent = model.norm(model.blocks(torch.cat([cls, tokens.gather(1, keep)], dim=1)))

    def linear(y, name):
        return F.linear(y, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(y, name):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.layer_norm(y, weight.shape, weight, bias, 1e-6)

    y = linear(latent, "decoder_embed")
    width = y.shape[-1]
    hidden = state["mask_token"].expand(len(x), N - visible, -1)
    shuffled = torch.cat([y[:, 1:], hidden], dim=1)
    whole = shuffled.gather(1, restore[:, :, None].expand(-1, -1, width))
    y = torch.cat([y[:, :1], whole], dim=1) + state["decoder_pos_embed"]
    for i in range(2):
        block = f"decoder_blocks.{i}."
        qkv = linear(norm(y, block + "norm1"), block + "attn.qkv")
        q, k, v = qkv.view(len(x), N + 1, 3, 16, width // 16).permute(2, 0, 3, 1, 4)
        rows = (q @ k.mT / (width // 16) ** 0.5).softmax(-1)
        y = y + linear((rows @ v).transpose(1, 2).flatten(2), block + "attn.proj")
        inner = F.gelu(linear(norm(y, block + "norm2"), block + "mlp.fc1"))
        y = y + linear(inner, block + "mlp.fc2")
    return linear(norm(y, "decoder_norm"), "decoder_pred")[:, 1:]


@pytest.mark.parametrize(("ratio", "visible"), [(0.0, 4), (0.5, 8)])
def test_official_prediction(tmp_path, caplog, ratio, visible):
    model, state = official_state()
    path = saved({"model": state}, tmp_path)
    caplog.set_level("INFO")
    found = opened(path)
    with torch.inference_mode():
        expected = original_prediction(model, state, images(), noise(), visible)
        prediction, mask = predicted(found, images(), noise(), ratio)
    torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1
    assert mask.sum(1).tolist() == [N - visible] * 2
    assert found.objective.target_known_from == ""
    assert not found.training
    assert "decoder of MAE (official), 31 of 31 tensors" in caplog.text


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_official_options_in_the_file(tmp_path, normalized, wrapped):
    options = {"norm_pix_loss": normalized, "mask_ratio": 0.5}
    args = argparse.Namespace(**options) if wrapped else options
    found = opened(saved({"model": official_state()[1], "args": args}, tmp_path))
    assert found.config.normalize_target is normalized
    assert found.config.mask_ratio == 0.5
    assert found.objective.target_known_from == f"norm_pix_loss in the file's args is {normalized}"


def test_other_size(tmp_path):
    """Positions of both halves are resampled; at twice the width there are twice the patches."""
    found = opened(saved({"model": official_state()[1]}, tmp_path), size=(32, 64))
    assert found.encoder.grid == (4, 8)
    assert found.objective.decoder.positions.shape == (2 * N, WIDTH)
    with torch.inference_mode():
        prediction, mask = predicted(found, images((32, 64)), noise(2 * N))
    assert prediction.isfinite().all()
    assert mask.sum(1).tolist() == [24, 24]
    before = opened(saved({"model": official_state()[1]}, tmp_path)).objective.decoder.positions
    corner = found.objective.decoder.positions.view(4, 8, -1)
    assert (corner[:, :2].mean(1) - before.view(4, 4, -1)[:, 0]).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_norm.weight": None}, r"30 of 31 tensors match: 1 missing \(norm\.weight\)"),
        ({"decoder_blocks.1.attn.new": torch.ones(2)}, r"1 unexpected \(blocks\.1\.attn\.new\)"),
        (dict.fromkeys(official_names("decoder_blocks.")), "the decoder has no blocks"),
        ({"mask_token": None}, r"1 missing \(mask_token\)"),
        ({"decoder_pos_embed": None}, r"decoder_pos_embed is None"),
        ({"decoder_pos_embed": torch.ones(1, N + 1, WIDTH)}, r"gives \[CLS\] a position"),
        ({"decoder_pos_embed": torch.zeros(1, 10, WIDTH)}, r"has 9 patches; there are 16"),
        ({"decoder_pos_embed": torch.zeros(1, N + 1, 40)}, r"of width 40, which the 16 heads"),
    ],
)
def test_official_refusals(tmp_path, change, message):
    state = official_state()[1] | change
    path = saved({"model": {k: v for k, v in state.items() if v is not None}}, tmp_path)
    with pytest.raises(UserError, match=message) as refusal:
        opened(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("bad", [{"norm_pix_loss": "yes"}, {"mask_ratio": 2.0}])
def test_options_that_are_none(tmp_path, bad):
    args = argparse.Namespace(**bad)
    with pytest.raises(UserError, match=f"{next(iter(bad))} in its args is"):
        opened(saved({"model": official_state()[1], "args": args}, tmp_path))


# -- Hugging Face


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=192,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=256,
        mask_ratio=0.5,
        norm_pix_loss=True,
        layer_norm_eps=1e-3,
    )
    model = noisy(transformers.ViTMAEForPreTraining(config))
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[:, 0] = 0
        model.decoder.decoder_pos_embed[:, 0] = 0
    folder = tmp_path_factory.mktemp("hugging")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("blocks", ["decoder_layers", "decoder_encoder.layer"])
def test_hugging_face_prediction(hugging_face, tmp_path, blocks):
    """Under the names of the released files, and under those of transformers 5."""
    model, folder = hugging_face
    state = {
        re.sub(r"decoder_layers|decoder_encoder\.layer", blocks, name): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    assert any(f".{blocks}.1." in name for name in state)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    folder = tmp_path
    found = opened(folder)
    with torch.inference_mode():
        theirs = model(images(), noise=noise())
        prediction, mask = predicted(found, images(), noise())
    torch.testing.assert_close(prediction, theirs.logits, atol=1e-5, rtol=1e-5)
    assert mask.equal(theirs.mask)
    assert theirs.logits.std() > 0.1
    assert (found.config.normalize_target, found.config.mask_ratio) == (True, 0.5)
    assert found.objective.target_known_from == "norm_pix_loss in config.json is True"


def test_hugging_face_without_its_configuration(hugging_face, tmp_path):
    """The tensors tell neither heads nor target; an encoder without a decoder is said to be one."""
    _, folder = hugging_face
    config = json.loads((folder / "config.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (copy / "config.json").write_text(json.dumps(config | {"decoder_num_attention_heads": 5}))
    with pytest.raises(UserError, match="width 64 with 5 heads"):
        opened(copy)
    del config["norm_pix_loss"]
    (copy / "config.json").write_text(json.dumps(config))
    found = opened(copy)
    assert found.config.normalize_target is False  # as transformers takes it
    assert found.objective.target_known_from


# -- runs


def own_run(folder, **options):
    """A run folder with all that a picture needs, of random weights that matter."""
    method = MAEConfig(decoder_width=32, decoder_depth=2, decoder_heads=4, **options)
    torch.manual_seed(0)
    mae = noisy(MAE(method, SMALL, 5), 0.2)
    checkpoint = folder / "checkpoints" / "step-00000007"
    checkpoint.mkdir(parents=True)
    save_file(mae.state_dict(), checkpoint / "task.safetensors")
    size = (checkpoint / "task.safetensors").stat().st_size
    state = {"step": 7, "world": 1, "files": {"task.safetensors": size}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    data = DataConfig(train="digits", channels=5, mean=(0.5,) * 5, std=(0.25,) * 5)
    config = PretrainConfig(method=method, encoder=SMALL, data=data)
    (folder / "config.yaml").write_text(to_yaml(config))
    info = EncoderInfo(SMALL, 5, (0.5,) * 5, (0.25,) * 5, "mae", 7)
    save_encoder(folder / "encoder.safetensors", mae.encoder, info)
    return mae


@pytest.mark.parametrize("name", ["run", "run/encoder.safetensors"])
def test_own_run(tmp_path, name):
    """Five channels, no square, a bare half masked: as the task itself predicts."""
    mae = own_run(tmp_path / "run", normalize_target=False, mask_ratio=0.5)
    found = opened(tmp_path / name)
    x = images((16, 24), 5)
    with torch.inference_mode():
        expected, mask = mae.objective.predict(mae.encoder, x, noise(6))
        prediction, own_mask = predicted(found, x, noise(6))
    torch.testing.assert_close(prediction, expected, atol=1e-6, rtol=1e-6)
    assert own_mask.equal(mask)
    assert mask.sum() == 6
    assert found.config.normalize_target is False
    assert found.objective.target_known_from == "normalize_target in its config.yaml"
    assert found.config == mae.config


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    mae = own_run(tmp_path)
    first = tmp_path / "checkpoints" / "step-00000007"
    torn = tmp_path / "checkpoints" / "step-00000009"
    torn.mkdir()
    (torn / "state.json").write_text((first / "state.json").read_text())
    found = opened(tmp_path)
    assert found.objective.decoder.embed.weight.equal(mae.objective.decoder.embed.weight)


def test_refusals_of_what_has_no_decoder(tmp_path):
    own_run(tmp_path / "run")
    encoder = tmp_path / "run" / "encoder.safetensors"
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / encoder.name).write_bytes(encoder.read_bytes())
    (tmp_path / "other.safetensors").write_bytes(encoder.read_bytes())
    backbone = open_backbone(str(encoder), 0)
    (tmp_path / "dino").mkdir()
    info = replace(backbone.info, method="dino")
    save_encoder(tmp_path / "dino" / "encoder.safetensors", backbone.module, info)
    official = saved({"model": vit(num_classes=0).state_dict()}, tmp_path)
    cases = {
        tmp_path / "alone": "an encoder alone",
        tmp_path / "other.safetensors": "an encoder alone",
        tmp_path / "dino": "trained by dino, which has no decoder",
        official: "an encoder alone, without a decoder",
        f"random:{tmp_path / 'run'}": "has no decoder",
        f"pixels:{tmp_path / 'run'}": "has no decoder",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as refusal:
            opened(name)
        assert str(name) in str(refusal.value)
        assert "ViTMAEForPreTraining" in str(refusal.value)
        assert "\n" not in str(refusal.value)
    found, x = opened(tmp_path / "run"), images((16, 24), 5)
    normalize = Normalize((0.5,) * 5, (0.25,) * 5)
    with pytest.raises(UserError, match=r"--mask-ratio is 0\.9; of 6 patches it leaves 0 visible"):
        found.reconstruct(x, mask_keys(2, 0), normalize, mask_ratio=0.9)
    assert read_decoder(official) is None


# -- which target


class OracleObjective(MAEObjective):
    """Predicts what its target would be, blurred: as a decoder that has learned half of it."""

    normalized = False

    def predict(self, encoder, images, noise, visible=None, valid=None):
        mask = super().predict(encoder, images, noise, visible, valid)[1]
        patches = encoder.patchify(images)
        mean, std = patch_statistics(patches)
        if self.normalized:
            return 0.5 * (patches - mean) / std, mask
        return mean + 0.2 * (patches - mean), mask


class Oracle(MAE):
    def __init__(self, normalized):
        super().__init__(MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=2), SMALL, 3)
        self.add("mae", OracleObjective(self.config, self.encoder))
        self.objective.normalized = normalized
        self.objective.target_known_from = ""


@pytest.mark.parametrize("normalized", [True, False])
def test_the_target_that_explains_more(normalized, caplog):
    """Images of patches that differ more from each other than within, as photographs' do."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(4, 1, 2, 3, generator=generator).repeat_interleave(8, 2)
    x = flat.repeat_interleave(8, 3) + 0.3 * torch.randn(4, 3, 16, 24, generator=generator)
    mae = Oracle(normalized)
    order = mae.objective.noise(mask_keys(4, 0))
    given, hidden = mae.objective.predict(mae.encoder, x, order)
    patches = mae.encoder.patchify(x)
    shares = explained_shares(patches, given, hidden > 0)
    right, wrong = ("normalized", "pixels") if normalized else ("pixels", "normalized")
    mean, std = patch_statistics(patches)
    wanted = ((patches - mean) / std if normalized else patches)[hidden > 0]
    loss, spread = (given[hidden > 0] - wanted).square().mean(), wanted.var(correction=0)
    assert shares[right] == pytest.approx(float(1 - loss / spread), abs=1e-4)
    assert shares[right] > 0.5
    assert shares[wrong] < 0.1
    caplog.set_level("INFO")
    display = Normalize(*HALF)
    decided = reconstruction_panel(mae, x, display)
    assert f"target: {'normalised patches' if normalized else 'raw pixels'}" in caplog.text
    assert "decided on these images" in caplog.text
    told = reconstruction_panel(mae, x, display, target=right)
    caplog.clear()
    other = reconstruction_panel(mae, x, display, target=wrong)
    assert f"target: {'raw pixels' if normalized else 'normalised patches'}" in caplog.text
    top = slice(0, 16 + 4 * 100)
    assert (decided[top] == told[top]).all()
    assert (decided[top] != other[top]).any()
    mae.objective.config = replace(mae.config, normalize_target=not normalized)
    mae.objective.target_known_from = "its file"
    assert (reconstruction_panel(mae, x, display)[top] == other[top]).all()
