"""Rotary positions against the recorded numbers of DINOv3 and timm's Eva, whole and in parts."""

import copy
from dataclasses import replace

import pytest
import timm
import torch

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.model.attention import cls_attention_rows, cls_features
from ssl_vit.model.block import LeanBlock, LeanEvaBlock
from ssl_vit.model.drop_path import batch_share
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.execution import checkpoint_activations, choose_attention
from ssl_vit.model.rope import Augmentation, Rope, Rotation
from ssl_vit.objectives.ema import Teacher
from tests.parity.golden import check_there_are, close, golden_files, read_golden

DOUBLE = torch.zeros((), dtype=torch.float64)
CPU = torch.device("cpu")
SMALL = EncoderConfig(
    "vit_small_patch16_dinov3_qkvb", image_size=(32, 48), patch_size=8, width=48, depth=3, heads=4
)
GATED = replace(SMALL, arch="vit_small_plus_patch16_dinov3")
ROPES = golden_files("dinov3_rope*.safetensors")
ENCODERS = golden_files("dinov3_vit_*.safetensors")


def made(config: EncoderConfig = SMALL, **changes) -> Encoder:
    """An encoder with random weights of a size that shows, in float64."""
    torch.manual_seed(0)
    encoder = Encoder(replace(config, **changes), 3).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    choose_attention(encoder, CPU)
    return encoder


def images(count: int = 2, height: int = 32, width: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


# --- the recorded numbers -----------------------------------------------------------------------


def test_there_are_recorded_numbers():
    check_there_are(ROPES, "dinov3_rope*")
    check_there_are(ENCODERS, "dinov3_vit_*")


@pytest.mark.parametrize("path", ROPES, ids=lambda path: path.stem)
def test_sines_and_cosines_are_the_originals(path):
    config, tensors = read_golden(path)
    head = config["embed_dim"] // config["num_heads"]
    for i, (coords, base, least, largest) in enumerate(config["kinds"]):
        rope = Rope(head, 0, (base,) if base else (least, largest), coords)
        found = torch.tensor(rope.all_periods(), dtype=torch.float64)
        close(found, tensors[f"kind{i}.periods"], f"periods of kind {i}")
        angles = rope.angles(tuple(config["grid"]), DOUBLE).repeat(1, 2)
        close(angles.cos(), tensors[f"kind{i}.cos"], f"cosines of kind {i}")
        close(angles.sin(), tensors[f"kind{i}.sin"], f"sines of kind {i}")


@pytest.mark.parametrize("path", ENCODERS, ids=lambda path: path.stem)
def test_what_training_does_to_coordinates_is_the_originals(path):
    config, tensors = read_golden(path)
    if "rope_aug" not in config:
        pytest.skip("no such numbers in this file")
    rescale = tensors["rope_aug.rescale"].item()
    shift, jitter = (tensors[f"rope_aug.{name}_hw"].tolist() for name in ("shift", "jitter"))
    rope = Rope(config["embed_dim"] // config["num_heads"], 0)
    grid, scale = tuple(config["rope_aug"]["grid"]), tuple(j * rescale for j in jitter)
    angles = rope.angles(grid, DOUBLE, tuple(shift), scale).repeat(1, 2)
    close(angles.cos(), tensors["rope_aug.cos"], "cosines")
    close(angles.sin(), tensors["rope_aug.sin"], "sines")


# --- timm's numbers -----------------------------------------------------------------------------


def eva(encoder: Encoder) -> torch.nn.Module:
    """timm's own model with the same weights."""
    config = encoder.config
    sizes = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    model = timm.create_model(
        config.arch, num_classes=0, img_size=config.image_size, patch_size=8, **sizes
    )
    model.load_state_dict(encoder.vit.state_dict(), strict=True)
    return model.double().train(encoder.training)


@pytest.mark.parametrize("attention", ["cpu", "cuda"])
@pytest.mark.parametrize("config", [SMALL, GATED], ids=["mlp", "swiglu"])
def test_numbers_and_gradients_are_timms(config, attention):
    """``attention``: of which device; it is computed on the CPU."""
    encoder = made(config)
    choose_attention(encoder, torch.device(attention))
    theirs = eva(encoder)
    x = images()
    ours = encoder.encode(encoder.embed(x))
    expected = theirs.forward_features(x)
    # timm's table is float32.
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for out in (ours, expected):
        (out * torch.arange(out.shape[1])[:, None]).square().mean().backward()
    found = dict(encoder.vit.named_parameters())
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max()
        assert (found[name].grad - parameter.grad).abs().max() <= 1e-5 * scale, name


def test_timms_forward_through_our_blocks_is_timms():
    """As fine-tuning does."""
    encoder = made()
    assert type(encoder.vit.blocks[0]) is LeanEvaBlock
    x = images()
    expected = eva(encoder).forward_features(x)
    torch.testing.assert_close(encoder.vit.forward_features(x), expected, rtol=1e-5, atol=1e-5)


# --- in parts -----------------------------------------------------------------------------------


def test_kept_patches_turn_by_their_own_places():
    """All of them in another order are the same tokens, and some see some."""
    encoder = made().eval()
    x = images()
    whole = encoder(x)
    order = torch.stack([torch.randperm(24) for _ in x])
    tokens = encoder.encode(encoder.embed(x, keep=order))
    torch.testing.assert_close(tokens[:, 0], whole.cls)
    wanted = whole.patches.gather(1, order[:, :, None].expand(-1, -1, 48))
    torch.testing.assert_close(tokens[:, 5:], wanted)
    few, same = order[:, :6], order[:, :6].sort(1).values
    some = encoder.encode(encoder.embed(x, keep=few))[:, 0]
    torch.testing.assert_close(some, encoder.encode(encoder.embed(x, keep=same))[:, 0])
    moved = encoder.embed(x, keep=few)
    moved.places = same
    assert not torch.allclose(encoder.encode(moved)[:, 0], some)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_stochastic_depth_takes_the_places_of_the_images_it_keeps(rate):
    """What is computed of the kept rows alone is what is computed of all and then dropped."""
    encoder = made(drop_path=rate).train()
    x, keep = images(6), torch.stack([torch.randperm(24)[:7] for _ in range(6)])

    def out() -> torch.Tensor:
        with batch_share(0, 1, 6, key=3):
            return encoder.encode(encoder.embed(x, keep=keep))

    spared = out()
    for block in encoder.vit.blocks:
        block.whole = True
    torch.testing.assert_close(spared, out())
    assert rate == 0 or not torch.allclose(spared, encoder.eval().encode(encoder.embed(x, keep)))


def test_activations_computed_again_give_the_same_gradients():
    encoder = made(drop_path=0.3, rope_rescale=2.0).train()
    again = copy.deepcopy(encoder)
    checkpoint_activations(again)
    keep = torch.stack([torch.randperm(24)[:9] for _ in range(4)])
    for network in (encoder, again):
        with batch_share(0, 1, 4, key=5):
            network.encode(network.embed(images(4), keep=keep)).square().sum().backward()
    for one, two in zip(encoder.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_cls_alone_is_that_of_the_whole():
    encoder = made().eval()
    torch.testing.assert_close(cls_features(encoder, images()), encoder(images()).cls)
    rows = cls_attention_rows(encoder, images())
    block, x = encoder.vit.blocks[-1], encoder.embed(images())
    tokens = encoder.with_prefix(x)
    *before, (_, turn) = encoder.blocks(x)
    for each, own in before:
        tokens = each(tokens, **own)
    q, k, _ = block.attn.project(block.norm1(tokens), None, **turn)
    wanted = (q[:, :, :1] @ k.mT * block.attn.scale).softmax(-1)[:, :, 0]
    torch.testing.assert_close(rows, wanted)


# --- what training does to coordinates ----------------------------------------------------------


def drawn(rope: Rope, key: int, grid=(4, 6), blocks: int = 3) -> list[Rotation]:
    with batch_share(0, 1, 2, key=key):
        return list(rope.turns(grid, None, DOUBLE, blocks, changed=True))


def test_coordinates_are_a_function_of_the_batch_the_block_and_the_grid():
    rope = Rope(12, 5, augmented=Augmentation(shift=0.2, jitter=1.5, rescale=2.0))
    first, again, other = drawn(rope, 7), drawn(rope, 7), drawn(rope, 8)
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one.values, two.values)
        assert not torch.equal(one.values, three.values)
    assert not torch.equal(first[0].values, first[1].values)
    with batch_share(1, 4, 2, key=7):  # another share of the same batch
        share = next(rope.turns((4, 6), None, DOUBLE, 3, changed=True))
    assert torch.equal(share.values, first[0].values)
    still = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert (first[0].values[:, :5] == still[:, None, None]).all()


def test_draws_are_uniform_and_log_uniform_within_their_bounds():
    generator = torch.Generator().manual_seed(0)
    augmentation = Augmentation(shift=0.25, jitter=1.5, rescale=2.0)
    draws = [augmentation.draw(generator) for _ in range(4000)]
    shifts, scales = (torch.tensor([d[i] for d in draws]) for i in (0, 1))
    assert 0.24 < shifts.abs().max() <= 0.25
    assert shifts.mean(0).abs().max() < 0.02
    logs = scales.log()
    ratio, both = logs[:, 0] - logs[:, 1], logs.mean(1)
    assert 0.7 < ratio.abs().max() <= 2 * torch.tensor(1.5).log()
    assert logs.abs().max() <= torch.tensor(3.0).log() + 1e-6
    # Uniform in (-a, a) has the variance a^2 / 3; a mean of two jitters half of theirs.
    jitter, rescale = torch.tensor([1.5, 2.0]).log()
    torch.testing.assert_close(both.var(), jitter**2 / 6 + rescale**2 / 3, rtol=0.1, atol=0)
    torch.testing.assert_close(ratio.var(), 2 * jitter**2 / 3, rtol=0.1, atol=0)


def test_coordinates_change_in_a_students_training_only():
    encoder = made(rope_rescale=2.0)
    teacher = Teacher(encoder).double()
    teacher.start_from(encoder)
    x = images()
    with batch_share(0, 1, 2, key=1):
        student, taught = encoder.train()(x).cls, teacher.train().encoder(x).cls
        torch.testing.assert_close(taught, encoder.eval()(x).cls)
        assert not torch.allclose(student, taught)
    assert not torch.allclose(encoder.train()(x).cls, encoder(x).cls)  # outside: drawn anew


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "vit_small_patch16_224", "rope_rescale": 2.0}, "for rotary positions"),
        ({"heads": 8}, "of 6 features each; rotary positions need a number that 4 divides"),
        ({"arch": "eva02_tiny_patch14_224"}, "must be a plain ViT of timm"),
        ({"rope_periods": (1.0, 2.0, 3.0)}, "--encoder.rope-periods has 3 values"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Encoder(replace(SMALL, **changes), 3)


def test_blocks_of_added_positions_are_told_nothing():
    encoder = Encoder(EncoderConfig("vit_tiny_patch16_224", image_size=(32,), patch_size=8), 3)
    tokens = encoder.embed(images(height=32, width=32).float())
    assert all(isinstance(b, LeanBlock) and not turn for b, turn in encoder.blocks(tokens))
