"""What is rebuilt to be measured against does the same work as ours."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ssl_vit.config import EncoderConfig, OptimConfig, UserError
from ssl_vit.data.augment import Crop, Normalize, ViewSpec
from ssl_vit.data.base import Source
from ssl_vit.data.decode import decode
from ssl_vit.data.photometric import Photometric
from ssl_vit.evaluators.measured import Speed, cpu_model
from ssl_vit.evaluators.peers import LightlyDINO, OriginalChain
from ssl_vit.evaluators.speed import one_thread, random_batch, readable, single_views
from ssl_vit.methods.dino import DINO, DINOConfig

NONE = ViewSpec((Crop((8, 12), scale=(1.0, 1.0), ratio=(1.5, 1.5), flip=0.0),))
EVERY = Photometric(jitter=1.0, gray=1.0, blur=1.0, solarize=1.0)
TINY = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(16,), patch_size=4, width=16, depth=1, heads=1
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


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("grouped", [False, True])
def test_lightlys_step_is_ours_in_other_modules(grouped):
    """With our weights in its modules the loss is ours, so both sides do the same work."""
    pytest.importorskip("lightly")
    config = DINOConfig(prototypes=24, head_width=12, bottleneck=8, local_crops=3, local_size=(8,))
    torch.manual_seed(0)
    ours = DINO(config, TINY, 3).eval()
    for module in (ours.encoder, ours.head):
        for p in module.parameters():
            torch.nn.init.normal_(p.data, std=0.3)
    # The two resample positions for local crops by different rules; here every place has the same.
    ours.encoder.vit.pos_embed.data[:] = ours.encoder.vit.pos_embed.data[:, -1:]
    ours.teacher.load_state_dict(ours.encoder.state_dict())
    ours.teacher_head.load_state_dict(ours.head.state_dict())
    optim, device = OptimConfig(), torch.device("cpu")
    peer = LightlyDINO(TINY, 3, config, optim, device, torch.float32, grouped)
    head = {k.replace("mlp.", "layers."): v for k, v in ours.head.state_dict().items()}
    for backbone, projection in (peer.student, peer.teacher):
        backbone.vit.load_state_dict(ours.encoder.vit.state_dict())
        projection.load_state_dict(head)
    spec, normalize = DINO.views(config, ours.encoder), Normalize((0.5,) * 3, (0.5,) * 3)
    batch = random_batch(spec, 2, 3, seed=0)
    expected = ours(normalize(batch.views), 0)["loss"]
    views = single_views(batch, spec, normalize)
    assert torch.allclose(peer.losses(views), expected, rtol=1e-5)
    before = [p.clone() for p in peer.teacher.parameters()]
    assert torch.isfinite(peer.step(views))
    assert any(
        not torch.equal(a, b) for a, b in zip(before, peer.teacher.parameters(), strict=True)
    )
