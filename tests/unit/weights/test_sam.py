"""SAM's image encoder: official files against timm's own loading, at their size and others."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.evaluators.backbone import open_backbone, timm_model
from ssl_vit.evaluators.classifier import classifier
from ssl_vit.evaluators.maps import maps_of
from ssl_vit.evaluators.start import open_start
from ssl_vit.model.architecture import without_memory
from ssl_vit.weights.sam import found_in, open_sam, timm_names
from tests.unit.evaluators.test_segment import run, textures

ARCH = "samvit_base_patch16"
SMALL = {
    "img_size": 128,
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 2,
    "window_size": 3,
    "global_attn_indexes": (1,),
    "neck_chans": 16,
}


def network() -> nn.Module:
    """A small SAM with no weight at its initial value, which would be zero for tables."""
    torch.manual_seed(0)
    made = timm.create_model(ARCH, num_classes=0, **SMALL).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of Meta's files, with the other parts of a SAM."""
    own = {f"image_encoder.{k.replace('mlp.fc', 'mlp.lin')}": v for k, v in state.items()}
    others = ("prompt_encoder.no_mask_embed.weight", "mask_decoder.iou_token.weight")
    return own | {name: torch.zeros(1, 16) for name in others}


@pytest.fixture
def file(tmp_path) -> Path:
    torch.save(official(network().state_dict()), tmp_path / "sam_vit_small.pth")
    return tmp_path / "sam_vit_small.pth"


@pytest.mark.parametrize("size", [(), (64, 96)])
def test_an_official_file_is_recognised_and_is_timms_network(file, size, caplog):
    caplog.set_level("INFO", "ssl_vit")
    theirs = timm.create_model(
        ARCH, num_classes=0, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **SMALL
    ).eval()
    found = open_backbone(str(file), 0, size)
    assert found.view.size == (size or (128, 128))
    assert found.view.mean == (0.485, 0.456, 0.406)
    assert "image encoder, 51 tensors; left out: mask_decoder 1, prompt_encoder 1" in caplog.text
    images = torch.randn(2, 3, *found.view.size)
    with torch.no_grad():
        assert torch.equal(found.embed(("pooled",))(images)["pooled"], theirs(images))
        own = maps_of(found, 2)(images)
        expected = theirs.forward_intermediates(images, indices=2, intermediates_only=True)
    for a, b in zip(own, expected, strict=True):
        assert torch.equal(a, b)
    assert found.identity["format"] == "SAM (official)"
    assert found.identity["arch"] == ARCH
    assert found.identity["arch_options"]["global_attn_indexes"] == (1,)
    assert found.folder == file.parent


@pytest.mark.parametrize("arch", timm.list_models("samvit_*_patch16"))
def test_published_architectures_are_told_by_their_shapes(arch):
    with without_memory():
        state = timm.create_model(arch, num_classes=0).state_dict()
    found = found_in(official(state), "some file")
    assert (found.arch, found.published) == (arch, True)
    with without_memory():
        own = timm.create_model(arch, num_classes=0, **found.options).state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in state.items()}
    assert timm_names(official(state)).keys() == state.keys()


def test_a_file_given_with_its_architecture(file, tmp_path):
    """Under official names, and under timm's."""
    torch.save({"model": network().state_dict()}, tmp_path / "timm.pth")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network()(images)
        for path in (file, tmp_path / "timm.pth"):
            found = timm_model(ARCH, str(path), False, 0, (64,), SMALL)
            assert torch.equal(found(images), expected)
    with pytest.raises(UserError, match=rf"weights of timm's {ARCH} cannot be loaded"):
        open_backbone(f"timm:{ARCH}:{file}", 0)


def test_random_weights_of_a_file_are_not_its_own(file):
    a, b = (open_backbone(f"{kind}{file}", 0, (64,)) for kind in ("", "random:"))
    assert a.identity["weights_sha256"] != b.identity["weights_sha256"]
    assert b.identity["format"] == "random"
    assert a.module.state_dict().keys() == b.module.state_dict().keys()


def test_patches_of_sam_are_segmented(file, tmp_path):
    sets = [textures(tmp_path / str(s), 12, s) for s in (0, 1)]
    score, card = run(open_backbone(str(file), 0, (64, 64)), *sets, epochs=2)
    assert card["probe"]["token_grid"] == (4, 4)
    assert score.features == "maps"
    with pytest.raises(UserError, match=r"--size is 40x64: .* takes no such images: Input height"):
        run(open_backbone(str(file), 0, (40, 64)), *sets)


def test_an_image_encoder_is_fine_tuned_with_its_own_architecture(file):
    start = open_start(str(file), EncoderConfig(), 3, 0)
    made = classifier(start, 5, "mean", (), 0.1, 0)
    assert made.size == (128, 128)
    assert made.network(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    own = start.module.state_dict()
    assert all(torch.equal(made.network.state_dict()[k], v) for k, v in own.items())


def test_other_files_are_no_sams(file, tmp_path):
    state = network().state_dict()
    torch.save(state, tmp_path / "timm.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("timm.pth", "text.pth", "nothing.pth", ""):
        assert open_sam(tmp_path / name) is None


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("neck.0.weight", "looks like a SAM, but image_encoder.neck.0.weight is missing"),
        ("blocks.1.norm1.bias", "cannot be loaded: .* Missing key.*blocks.1.norm1.bias"),
    ],
)
def test_what_is_missing_is_named(tmp_path, lost, message):
    state = network().state_dict()
    state.pop(lost)
    torch.save(official(state), tmp_path / "sam.pth")
    with pytest.raises(UserError, match=message) as error:
        open_backbone(str(tmp_path / "sam.pth"), 0)
    assert "\n" not in str(error.value)
