"""What is rebuilt to be measured against does the same work as ours."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ssl_vit.benchmarks.chains import OriginalChain
from ssl_vit.benchmarks.loader import one_thread, readable
from ssl_vit.benchmarks.measured import Speed, cpu_model
from ssl_vit.benchmarks.peers import peer_names
from ssl_vit.benchmarks.peers_dino import HuggingFaceDINO, OriginalDINO, TimmDINO
from ssl_vit.benchmarks.peers_dino_lightly import LightlyChain, LightlyDINO, LightlyGroupedDINO
from ssl_vit.benchmarks.peers_dinov2 import OriginalDINOv2, dropped_rows
from ssl_vit.benchmarks.peers_mae import HuggingFaceMAE, LightlyMAE, OriginalMAE
from ssl_vit.benchmarks.side import Workload
from ssl_vit.benchmarks.speed import random_batch, single_views
from ssl_vit.common.config import EncoderConfig, OptimConfig
from ssl_vit.common.errors import UserError
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.base import Source
from ssl_vit.data.decode import decode
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.photometric import Photometric
from ssl_vit.methods.dino import DINO
from ssl_vit.methods.dinov2 import DINOv2
from ssl_vit.methods.mae import MAE
from ssl_vit.model.encoder import parameter_count
from ssl_vit.options.dino import DINOConfig
from ssl_vit.options.dinov2 import DINOv2Config
from ssl_vit.options.mae import MAEConfig

NONE = ViewSpec((Crop((8, 12), scale=(1.0, 1.0), ratio=(1.5, 1.5), flip=0.0),))
EVERY = Photometric(jitter=1.0, gray=1.0, blur=1.0, solarize=1.0)
TINY = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(16,), patch_size=4, width=16, depth=2, heads=2
)
SINCOS = replace(TINY, positions="sincos")
ROTARY = replace(TINY, arch="vit_small_patch16_dinov3")
SMALL_DINO = DINOConfig(
    prototypes=24, head_width=12, bottleneck=8, local_crops=3, local_size=(8,), teacher_temp=0.05
)
SMALL_MAE = MAEConfig(decoder_width=12, decoder_depth=2, decoder_heads=3)


def work(method, encoder=TINY, batch=2):
    """A comparison in these sizes, in float32."""
    kind = {DINOv2Config: DINOv2, DINOConfig: DINO, MAEConfig: MAE}[type(method)]
    model = kind(method, encoder, 3)
    return Workload(
        encoder=encoder,
        channels=3,
        method=method,
        optim=OptimConfig(clip=0.1, clip_by="parameter", lr=0.01),
        spec=kind.view_spec(method, model.encoder),
        batch_size=batch,
        seed=0,
        statistics=((0.5,) * 3, (0.5,) * 3),
        device=torch.device("cpu"),
        precision=torch.float32,
    )


def image(height=16, width=24, channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_original_chain_yields_every_crop(channels):
    crops = (Crop((16, 16), photometric=EVERY), Crop((8, 12), count=3, photometric=EVERY))
    statistics = (0.5,) * channels, (0.25,) * channels
    chain = OriginalChain(ViewSpec(crops), channels, *statistics)
    batch = chain.batch([image(), image(30, 20)])
    assert [b.shape for b in batch] == [(2, channels, 16, 16)] + [(2, channels, 8, 12)] * 3
    assert all(b.dtype == torch.float32 and b.abs().max() <= 2 for b in batch)
    assert not torch.equal(batch[1], batch[2])  # each crop is drawn on its own


def test_without_chance_the_original_chain_is_ours():
    """The whole image, resized bicubically with antialiasing, scaled and standardised."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    (theirs,) = OriginalChain(NONE, 3, mean, std)(image())
    resized = torch.nn.functional.interpolate(
        decode(image(), 3)[None].float(), (8, 12), mode="bicubic", antialias=True
    )
    ours = Normalize(mean, std).images(resized.round().clamp(0, 255).to(torch.uint8))[0]
    assert (theirs - ours).abs().max() < 2 / 255 / 0.2


def test_each_photometric_operation_of_the_original_chain_acts():
    def crop(**chances):
        spec = ViewSpec((replace(NONE.crops[0], photometric=Photometric(**chances)),))
        return OriginalChain(spec, 3, (0.0,) * 3, (1.0,) * 3)(image())[0]

    plain = crop()
    assert torch.equal(plain, crop())
    gray = crop(gray=1.0)
    assert torch.equal(gray[0], gray[1])
    assert not torch.equal(gray[0], plain[0])
    solar = crop(solarize=1.0)
    assert torch.allclose(solar, torch.where(plain >= 128 / 255, 1 - plain, plain), atol=1e-6)
    blurred = crop(blur=1.0, blur_sigma=(2.0, 2.0))
    assert blurred.std() < plain.std()
    assert not torch.equal(crop(jitter=1.0), plain)


def test_lightlys_chain_makes_the_same_crops():
    pytest.importorskip("lightly")
    shared = work(SMALL_DINO)
    batches = [
        kind(shared.spec, 3, *shared.statistics).batch([image(), image(30, 20)])
        for kind in (OriginalChain, LightlyChain)
    ]
    assert [b.shape for b in batches[0]] == [b.shape for b in batches[1]]
    assert len(batches[0]) == 5
    gray = work(replace(SMALL_DINO, gray=1.0)).spec
    for view in LightlyChain(gray, 3, *shared.statistics)(image()):
        assert torch.equal(view[0], view[1])


def test_the_original_chain_refuses_other_channels():
    with pytest.raises(UserError, match=r"--data\.channels is 4"):
        OriginalChain(NONE, 4, (0.5,) * 4, (0.5,) * 4)


class Arrays(Source):
    spec, classes, labels = "made up", None, None

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def read(self, i):
        return self.items[i], None

    def name(self, i):
        return f"image {i}"


def test_unreadable_images_are_left_out_and_counted():
    good, bad = readable(Arrays([image(), b"", image()]), [lambda raw: decode(raw, 3)])
    assert (len(good), bad) == (2, 1)
    with pytest.raises(UserError, match=r"none of 1 images of made up can be read.*0 bytes"):
        readable(Arrays([b""]), [lambda raw: decode(raw, 3)])


def test_a_speed_is_the_median_of_its_repeats():
    card = Speed(6, [3.0, 1.0, 2.0]).card()
    assert card["images_per_second"] == 3
    assert card["images_per_second_of_repeats"] == [2, 6, 3]


def test_one_thread_is_for_a_while():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_the_processor_has_a_name(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU: v2\n")
    assert cpu_model(tmp_path / "cpuinfo") == "Some CPU: v2"
    assert isinstance(cpu_model(tmp_path / "none"), str)


def test_single_views_are_the_batch_in_order():
    spec = ViewSpec((Crop((4, 4)), Crop((2, 2), count=3)))
    batch = random_batch(spec, batch=2, channels=1, seed=0)
    views = single_views(batch, spec, Normalize((0.0,), (1.0,)))
    assert [tuple(v.shape) for v in views] == [(2, 1, 4, 4)] + [(2, 1, 2, 2)] * 3
    assert torch.equal((views[2] * 255).round(), batch.views.crops[1][2:4].float())


def test_peers_are_named_once_and_in_turn():
    known = ("original", "lightly")
    assert peer_names("none", known, "step mae") == []
    assert peer_names("lightly, original,lightly", known, "x") == ["lightly", "original"]
    with pytest.raises(UserError, match=r"'lightyl'; allowed for step mae: .*nearest.*lightly"):
        peer_names("original,lightyl", known, "step mae")
    with pytest.raises(UserError, match="'none'"):
        peer_names("none,original", known, "x")


def scattered(model):
    """Its weights far from their beginning, where all outputs are nearly alike."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "pos_embed" not in name:
            torch.nn.init.normal_(p.data, std=0.3)
    return model.eval()


@pytest.mark.parametrize("ratio", [0.75, 0.6])
def test_the_originals_mae_is_ours_in_other_modules(ratio):
    """With our weights and noise the loss is ours, so both sides do the same work."""
    shared = work(replace(SMALL_MAE, mask_ratio=ratio), SINCOS)
    ours = scattered(MAE(shared.method, SINCOS, 3))
    peer = OriginalMAE(shared)
    assert peer.parameters() == parameter_count(ours)
    state = {
        k.removeprefix("encoder.").removeprefix("objectives.mae.decoder."): v
        for k, v in ours.state_dict().items()
    }
    peer.networks.load_state_dict(state, strict=True)
    noise = torch.rand(2, 16)
    assert torch.allclose(
        peer.masked_loss(peer.views[0], noise),
        ours.objective.loss(ours.encoder, peer.views[0], noise),
        rtol=1e-5,
    )
    assert torch.isfinite(peer.step())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lightlys_mae_is_ours_in_other_modules():
    pytest.importorskip("lightly")
    shared = work(SMALL_MAE, SINCOS)
    ours = scattered(MAE(shared.method, SINCOS, 3))
    LightlyMAE.load()
    peer = LightlyMAE(shared)
    # Its own copy of fixed positions, and a mask token that nothing uses.
    net, extra = peer.networks, 16 + 17 * 12
    assert peer.parameters() == parameter_count(ours) + extra
    net.backbone.vit.load_state_dict(ours.encoder.vit.state_dict())
    names = {"mask_token": "mask_token", "embed": "decoder_embed", "blocks": "decoder_blocks"}
    names |= {"norm": "decoder_norm", "predict": "decoder_pred"}
    for key, value in ours.objective.decoder.state_dict().items():
        first, _, rest = key.partition(".")
        net.decoder.get_parameter(f"{names[first]}.{rest}".rstrip(".")).data.copy_(value)
    net.decoder.decoder_pos_embed.data[0, 1:] = ours.objective.decoder.positions
    noise = torch.rand(2, 16)
    order = noise.argsort(1) + 1
    keep = torch.cat([torch.zeros(2, 1, dtype=torch.long), order[:, :4]], 1)
    theirs = peer.masked_loss(peer.views[0], keep, order[:, 4:])
    assert torch.allclose(
        theirs, ours.objective.loss(ours.encoder, peer.views[0], noise), rtol=1e-5
    )
    assert torch.isfinite(peer.step())


def test_hugging_faces_mae_does_what_the_original_does():
    """As many weights (its positions are weights) and operations; ours are mapped elsewhere."""
    pytest.importorskip("transformers")
    shared = work(SMALL_MAE, SINCOS)
    HuggingFaceMAE.load()
    peer, original = HuggingFaceMAE(shared), OriginalMAE(shared)
    assert peer.parameters() == original.parameters() + 17 * 12
    assert peer.flops() == original.flops()
    with pytest.raises(UserError, match="stochastic depth"):
        HuggingFaceMAE(work(SMALL_MAE, replace(SINCOS, drop_path=0.1)))


def test_sizes_that_a_peer_cannot_have_are_refused():
    with pytest.raises(UserError, match=r"--against original: .*registers"):
        OriginalMAE(work(SMALL_MAE, replace(SINCOS, registers=2)))
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"--against huggingface: .*not square"):
        HuggingFaceMAE(work(SMALL_MAE, replace(SINCOS, image_size=(16, 8))))


def our_dino(shared, kind=DINO):
    """Ours, and the loss of the batch that peers have."""
    ours = kind(shared.method, shared.encoder, 3)
    scattered(ours.encoder)
    scattered(ours.objective.head)
    # Peers resample positions for local crops by other rules; here every place has the same.
    if not ours.encoder.rotary:
        ours.encoder.vit.pos_embed.data[:] = ours.encoder.vit.pos_embed.data[:, -1:]
    ours.objective.teacher.encoder.load_state_dict(ours.encoder.state_dict())
    ours.objective.teacher.head.load_state_dict(ours.objective.head.state_dict())
    batch = random_batch(shared.spec, shared.batch_size, 3, shared.seed)
    views = Normalize(*shared.statistics)(batch.views)
    return ours, lambda: ours(views, 0)["loss"]


@pytest.mark.parametrize(
    ("local_crops", "kind", "encoder"),
    [(3, OriginalDINO, TINY), (0, OriginalDINO, TINY), (3, TimmDINO, ROTARY)],
)
def test_the_originals_dino_is_ours_in_other_modules(local_crops, kind, encoder):
    """Loss, centre and clipped gradients with our weights."""
    shared = work(replace(SMALL_DINO, local_crops=local_crops), encoder)
    ours, loss = our_dino(shared)
    peer = kind(shared)
    assert peer.parameters() == parameter_count(ours)
    head = {f"mlp.{i}": f"mlp.{i // 2}.0" if i < 4 else "mlp.2.0" for i in (0, 2, 4)}
    head |= {"last_layer.weight_g": "last.parametrizations.weight.original0"}
    head |= {"last_layer.weight_v": "last.parametrizations.weight.original1"}
    state = {f"vit.{k}": v for k, v in ours.encoder.vit.state_dict().items()}
    for key, value in ours.objective.head.state_dict().items():
        old = next(name for name in head if key.startswith(name))
        state[head[old] + key.removeprefix(old)] = value
    for network in (peer.networks.student, peer.networks.teacher):
        network.load_state_dict(state, strict=True)
    ours.train()
    center = ours.objective.center
    for _ in range(2):  # the second time with a centre that has moved
        theirs = peer.loss(peer.views)
        assert torch.allclose(theirs, loss(), rtol=1e-5)
        total, count = center._seen[-1][:-1], center._seen[-1][-1]
        center.value.lerp_(total / count, 1 - shared.method.center_momentum)
        assert torch.allclose(peer.center[0], center.value, rtol=1e-4, atol=1e-7)
    theirs.backward()
    peer.clip()
    norms = [p.grad.norm() for p in peer.trained if p.grad is not None]
    assert max(norms) <= 0.1 + 1e-6
    assert max(norms) > 0.099
    before = [p.clone() for p in peer.networks.teacher.parameters()]
    assert torch.isfinite(peer.step())
    after = list(peer.networks.teacher.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_transformers_dinov3_does_what_timms_does():
    """As many weights, but for its mask token, and operations; ours are mapped elsewhere."""
    pytest.importorskip("transformers")
    shared = work(SMALL_DINO, replace(ROTARY, arch="vit_small_plus_patch16_dinov3"))
    theirs, timms = HuggingFaceDINO(shared), TimmDINO(shared)
    assert theirs.parameters() == timms.parameters() + 2 * 16
    assert abs(theirs.flops() / timms.flops() - 1) < 0.01
    assert torch.isfinite(theirs.step())


@pytest.mark.parametrize("kind", [TimmDINO, HuggingFaceDINO])
def test_peers_of_dinov3_are_for_its_encoders(kind):
    for encoder in (TINY, replace(ROTARY, rope_coords="max")):
        with pytest.raises(UserError, match=r"for encoders of DINOv3 as released"):
            kind(work(SMALL_DINO, encoder))
    with pytest.raises(UserError, match=r"--against original: .*rotary positions"):
        OriginalDINO(work(SMALL_DINO, ROTARY))


SMALL_DINOV2 = DINOv2Config(
    prototypes=24, head_width=12, bottleneck=8, local_crops=3, local_size=(8,), teacher_temp=0.05
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"local_crops": 0, "koleo_weight": 0.0},
        {"targets": "sinkhorn", "patch_prototypes": 20},
        {"plain_last_layer": True, "patch_prototypes": 20, "patch_bottleneck": 6},
        {"exact_masks": True, "koleo_images": 3},
    ],
)
def test_the_originals_dinov2_is_ours_in_other_modules(options):
    """Loss and every gradient with our weights, before and after the centres have moved."""
    shared = work(replace(SMALL_DINOV2, teacher_temp_warmup="0ep", **options), batch=6)
    ours, loss = our_dino(shared, DINOv2)
    peer = OriginalDINOv2(shared)
    assert peer.parameters() == parameter_count(ours)
    token = {"mask_token": ours.objective.mask_token}
    heads = {f"heads.{k}": v for k, v in ours.objective.head.state_dict().items()}
    vit = {f"vit.{k}": v for k, v in ours.encoder.vit.state_dict().items()}
    peer.give(peer.networks.student, vit | heads | token)
    peer.give(peer.networks.teacher, vit | heads)
    ours.train()
    for _ in range(2):
        theirs, own = peer.loss(peer.views), loss()
        assert torch.allclose(theirs, own, rtol=1e-5)
        ours.objective.cls_targets.update(torch.tensor(True))
        ours.objective.patch_targets.update(torch.tensor(True))
    theirs.backward()
    own.backward()
    found = {k: p.grad for k, p in peer.networks.student.named_parameters()}
    expected = {"mask_token": ours.objective.mask_token.grad}
    expected |= {f"vit.{k}": p.grad for k, p in ours.encoder.vit.named_parameters()}
    if shared.method.local_crops:  # of which positions are resampled by another rule
        del expected["vit.pos_embed"]
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-6)
    before = [p.clone() for p in peer.networks.teacher.parameters()]
    assert torch.isfinite(peer.step())
    after = list(peer.networks.teacher.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_originals_stochastic_depth_keeps_so_many_rows():
    """Of 6 x 2 rows at 0.3: 8 a branch, scaled by 12 / 8; at 0.99 one is kept."""
    x = torch.zeros(12, 3)
    for rate, kept in ((0.3, 8), (0.99, 1)):
        out = dropped_rows(x, torch.ones_like, rate)
        assert sorted(out[:, 0].tolist()) == pytest.approx([0.0] * (12 - kept) + [12 / kept] * kept)


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (ROTARY, {}, "rotary positions"),
        (TINY, {"gram_weight": 1.0}, "gram-weight"),
        (TINY, {"local_norm": True}, "local-norm"),
        (TINY, {"local_weight": 0.5}, "local-weight"),
    ],
)
def test_the_originals_dinov2_refuses_what_it_has_not(encoder, options, message):
    with pytest.raises(UserError, match=rf"--against original: .*{message}|--method\.{message}"):
        OriginalDINOv2(work(replace(SMALL_DINOV2, **options), encoder))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [LightlyDINO, LightlyGroupedDINO])
def test_lightlys_dino_is_ours_in_other_modules(kind):
    """With our weights in its modules the loss is ours, so both sides do the same work."""
    pytest.importorskip("lightly")
    shared = work(SMALL_DINO)
    ours, loss = our_dino(shared)
    kind.load()
    peer = kind(shared)
    head = {k.replace("mlp.", "layers."): v for k, v in ours.objective.head.state_dict().items()}
    for backbone, projection in (peer.networks.student, peer.networks.teacher):
        backbone.vit.load_state_dict(ours.encoder.vit.state_dict())
        projection.load_state_dict(head)
    assert torch.allclose(peer.loss(peer.views), loss(), rtol=1e-5)
    before = [p.clone() for p in peer.networks.teacher.parameters()]
    assert torch.isfinite(peer.step())
    after = list(peer.networks.teacher.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
