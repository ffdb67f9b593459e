"""The published linear probes: their numbers, and heads that learn from augmented images."""

import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.seeds import fold
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.loader import TrainImages
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.sources import Source, Subset, open_source
from ssl_vit.data.view import View
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.evaluators.features import Machine, extract, pixels
from ssl_vit.evaluators.linear_heads import FeatureNorm, heads_of
from ssl_vit.evaluators.online import online_probe, source_targets, train_heads
from ssl_vit.evaluators.options import parts_of
from ssl_vit.evaluators.published import (
    ONLINE,
    DinoProtocol,
    Dinov2Protocol,
    MaeProtocol,
    online_protocol,
)
from ssl_vit.evaluators.selection import NOT_CHOSEN, quality
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.execution import choose_attention
from tests.unit.feature_sets import top1

CPU = torch.device("cpu")
HERE = Machine(CPU, torch.float32, workers=0)
QUICK = Dinov2Protocol(epochs=2, learning_rates=(0.01, 0.5), features=("cls", "cls+mean"))


@cache
def backbone(width: int = 48, depth: int = 4, channels: int = 3) -> Backbone:
    """A small random encoder of 8 x 8 images."""
    torch.manual_seed(0)
    config = EncoderConfig("vit_tiny_patch16_224", (8,), 4, width=width, depth=depth, heads=4)
    module = Encoder(config, channels).eval()
    choose_attention(module, CPU)
    view = View((8, 8), channels, (0.3,) * channels, (0.35,) * channels)
    features = ("cls", "mean", "cls+mean", "cls4", "cls4+mean")
    return Backbone("small", module, view, features, {}, Path())


def extracted(source, of: Backbone | None = None):
    of = of or backbone()
    return extract(of.embed(parts_of(of.features)), source, of.view, HERE)


@cache
def digits(part: str, count: int = 300):
    return Subset(open_source(f"digits:{part}"), np.arange(count))


@cache
def val():
    return extracted(digits("val", 200))


# Digits that stay digits, of an encoder that has learned nothing.
EASY = {"epochs": 8, "scale": (0.9, 1.0), "flip": 0.0}
probe = partial(online_probe, backbone())


def run(protocol, source=None, machine=HERE, **more):
    source = digits("train") if source is None else source
    return probe(source, val(), protocol, machine, extracted, **more)[0]


# --- the published values -------------------------------------------------------------------------

IMAGENET = 1_281_167


def rates(protocol, steps) -> list[float]:
    """What a head's rate of 1 for 256 images comes to, on ImageNet."""
    order = protocol.order(IMAGENET, at_once=256)
    return [protocol.factor(step, order) for step in steps]


def test_mae_as_published():
    """Batch 16384, lr 6.4 at the peak after 10 of 90 epochs, 0 at both ends, changed each step."""
    protocol = MaeProtocol()
    assert (protocol.learning_rates, protocol.features) == ((0.1,), ("cls",))
    assert (protocol.trust, protocol.momentum, protocol.normed) == (0.001, 0.9, True)
    assert protocol.scale == (0.08, 1.0)
    order = protocol.order(IMAGENET, at_once=256)
    assert (order.batch_size, order.accumulate, order.steps_per_epoch) == (16384, 64, 78)
    found = rates(protocol, (0, 1, 780, 90 * 78 - 1))
    assert found[:3] == pytest.approx([0, 64 / 780, 64])
    assert found[3] == pytest.approx(64 * 0.5 * (1 + math.cos(math.pi * 6239 / 6240)))
    assert found[3] < 1e-5


def test_dino_as_published():
    """Batch 1024, lr .004, SGD on the last four [CLS]; a cosine of the epoch, not of the step."""
    protocol = DinoProtocol()
    assert (protocol.epochs, protocol.learning_rates, protocol.trust) == (100, (0.001,), 0)
    assert (protocol.features, protocol.normed, protocol.momentum) == (("cls4",), False, 0.9)
    found = rates(protocol, (0, 1250, 1251, 2501, 100 * 1251 - 1))
    second = 2 * (1 + math.cos(math.pi / 100))
    assert found[:4] == pytest.approx([4, 4, second, second])
    assert found[4] == pytest.approx(2 * (1 + math.cos(math.pi * 0.99)))


def test_dinov2_as_published():
    """13 rates x 4 features, batch 1024, 12,500 steps or so, no warm-up."""
    protocol = Dinov2Protocol()
    grid = protocol.learning_rates
    assert (len(grid), grid[0], grid[4], grid[-1]) == (13, 1e-5, 2e-4, 0.1)
    assert set(protocol.features) == {"cls", "cls+mean", "cls4", "cls4+mean"}
    assert (protocol.momentum, protocol.trust, protocol.normed) == (0.9, 0, False)
    order = protocol.order(IMAGENET, at_once=256)
    assert order.steps_per_epoch * protocol.epochs == 12510
    found = rates(protocol, (0, 6255, 12509))
    assert found[:2] == pytest.approx([4, 2])
    assert found[2] == pytest.approx(2 * (1 + math.cos(math.pi * 12509 / 12510)))


def test_a_protocol_as_it_is_for_an_encoder():
    """Depth and width decide what the papers let them decide; what is given wins."""
    small, deep, wide = backbone(), backbone(depth=24), backbone(width=400)
    assert [online_protocol("mae", b, 0).epochs for b in (small, deep)] == [90, 50]
    assert online_protocol("mae", deep, 0, epochs=7).epochs == 7
    assert [online_protocol("dino", b, 0).features for b in (small, wide)] == [
        ("cls4",),
        ("cls+mean",),
    ]
    given = online_protocol("dino", wide, 3, batch_size=64, features=("mean",))
    assert given == DinoProtocol(batch_size=64, features=("mean",), seed=3)
    assert set(ONLINE) == {"dinov2", "mae", "dino"}
    with pytest.raises(UserError, match=r"^epochs is -1; it must be 1 or more"):
        online_protocol("mae", small, 0, epochs=-1)
    with pytest.raises(UserError, match=r"^batch_size is -8; it must be 1 or more"):
        online_protocol("mae", small, 0, batch_size=-8)


def test_batches_of_small_sets_and_parts_of_large_ones():
    """At most an eighth of the images; all parts of a step are equally large."""
    for n, at_once, expected in (
        (50_000, 256, (6250, 25)),
        (4_000, 256, (500, 2)),
        (4_000, 300, (500, 2)),
        (7_000, 256, (872, 4)),
        (10, 256, (2, 1)),
    ):
        order = MaeProtocol().order(n, at_once)
        assert (order.batch_size, order.accumulate) == expected
        assert order.batch_size % order.accumulate == 0
    with pytest.raises(UserError, match="the training set has 1 images; the probe needs 2"):
        MaeProtocol().order(1, 256)


# --- learning from augmented images ---------------------------------------------------------------


def test_a_head_learns_as_a_loop_over_augmented_images_does():
    """torch's own layer and optimizer on the same crops of the same images."""
    protocol = replace(QUICK, learning_rates=(0.5,), features=("mean",), batch_size=64)
    source, of = digits("train", 200), backbone()
    point = [("mean", 0.5)]
    heads = heads_of(point, {"mean": 48}, 10, 0)
    linear = torch.nn.Linear(48, 10)
    linear.weight.data = heads["mean"].weight.data[0].clone()
    linear.bias.data.zero_()
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0, momentum=0.9)
    done = train_heads(heads, of, source, source_targets(source), protocol, HERE)
    assert done == {"batch_size": 25, "steps": 16}

    images = TrainImages(source, ViewSpec((Crop((8, 8), (0.08, 1.0)),)), 3, fold(0, 3))
    order, normalize = protocol.order(200, 256), Normalize(of.view.mean, of.view.std)
    for step in range(16):
        epoch, rows = order.part(step, 0)
        views = normalize(images.__getitems__([(epoch, int(i)) for i in rows]).views)
        with torch.no_grad():
            features = of.module(views.crops[0]).pool("mean")
        loss = F.cross_entropy(linear(features), views.labels)
        optimizer.param_groups[0]["lr"] = 0.5 * 25 / 256 * 0.5 * (1 + math.cos(math.pi * step / 16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(heads["mean"].weight[0], linear.weight, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(linear.weight, heads_of(point, {"mean": 48}, 10, 0)["mean"].weight[0])


def test_parts_and_workers_change_nothing():
    """How many images are seen at once, and by how many processes they are read: the same heads."""
    protocol = replace(MaeProtocol(), epochs=2, batch_size=64, trust=0.0, seed=1)
    made = []
    for at_once, workers in ((256, 0), (16, 0), (256, 2)):
        heads = heads_of([("cls", 0.1)], {"cls": 48}, 10, 0, lambda _: FeatureNorm(48))
        source = digits("train", 256)
        machine = Machine(CPU, torch.float32, workers, at_once)
        train_heads(heads, backbone(), source, source_targets(source), protocol, machine)
        made.append(heads["cls"])
    assert torch.equal(made[0].weight, made[2].weight)
    torch.testing.assert_close(made[0].weight, made[1].weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(made[0].norm.mean, made[1].norm.mean, atol=1e-5, rtol=1e-4)
    assert float(made[0].norm.mean.abs().max()) > 0.1


@pytest.mark.parametrize(
    "protocol",
    [
        replace(MaeProtocol(**EASY), batch_size=32, learning_rates=(400.0,)),
        replace(DinoProtocol(**EASY), learning_rates=(3.0,)),
        replace(QUICK, learning_rates=(0.01, 3.0), **EASY),
    ],
)
def test_digits_are_learned(protocol):
    found = run(protocol)
    assert found.guesses.shape == (200, 5)
    assert top1(found, val().labels) > 40
    assert found.details["protocol"] == protocol.name
    assert found.details["steps"] == protocol.epochs * (
        (270 if protocol.held_out else 300) // found.details["batch_size"]
    )
    rate = float(found.setting.removeprefix("lr="))
    assert found.details["lr"] == pytest.approx(rate * found.details["batch_size"] / 256)


def test_the_choice_is_made_on_what_is_held_out():
    """Chosen: the best on held-out images, as they are; a given set takes the place of a tenth."""
    found = run(QUICK)
    held = found.details["held_out_quality"]
    assert set(held) == {"cls", "cls+mean"}
    flat = {(name, rate): v for name, by in held.items() for rate, v in by.items()}
    assert flat[found.features, found.setting.removeprefix("lr=")] == max(flat.values())
    own = Subset(open_source("digits:train"), np.arange(300, 400))
    given = run(QUICK, held_out=own)
    assert given.details["held_out_quality"] != held
    heads = heads_of(
        [(given.features, 0.5)], {given.features: 48 * (1 + ("+" in given.features))}, 10, 0
    )
    source = digits("train")
    train_heads(heads, backbone(), source, source_targets(source), QUICK, HERE)
    of = extracted(own)
    logits = heads[given.features].logits(of.feature(given.features), 0.5)
    expected = given.details["held_out_quality"][given.features]["0.5"]
    assert quality(logits, of.labels) == pytest.approx(expected, abs=1e-3)


def test_the_choice_does_not_depend_on_the_queries():
    """One query alone, the same twice, whatever the global generators are at."""
    torch.manual_seed(5)
    together = run(QUICK)
    np.random.seed(3)
    torch.manual_seed(7)
    few = val().take(torch.tensor([3]))
    (alone,) = probe(digits("train"), few, QUICK, HERE, extracted)
    assert torch.equal(alone.guesses, together.guesses[3:4])
    assert alone.details == together.details
    assert (
        run(replace(QUICK, seed=2)).details["held_out_quality"] != alone.details["held_out_quality"]
    )


def test_one_image_a_class():
    """Nothing to choose by: the fixed point, and details say so."""
    source = open_source("digits:train")
    first = np.array([int(np.flatnonzero(source.labels == c)[0]) for c in range(10)])
    for protocol in (QUICK, MaeProtocol(epochs=5), DinoProtocol(epochs=5)):
        found = run(protocol, Subset(source, first))
        assert found.guesses.shape == (200, 5)
        assert found.details.get("selection") == (NOT_CHOSEN if protocol is QUICK else None)
    assert (run(QUICK, Subset(source, first)).setting) == "lr=0.005"


class Changed(Source):
    """Digits that are otherwise: their channels, their labels."""

    def __init__(self, source: Source, channels: int = 1) -> None:
        self.source, self.spec, self.channels = source, "changed", channels
        self.labels, self.classes = source.labels, source.classes

    def __len__(self) -> int:
        return len(self.source)

    def read(self, i: int):
        raw, label = self.source.read(i)
        return np.repeat(raw[:, :, None], self.channels, axis=2), label

    def name(self, i: int) -> str:
        return self.source.name(i)


class Tagged(Changed):
    """Several labels each: even, above 4, round; some unknown, and one image broken."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        digit = source.labels
        tags = [digit % 2 == 0, digit > 4, np.isin(digit, (0, 6, 8, 9))]
        self.targets = np.stack(tags, 1).astype(np.float32)
        self.targets[::7, 1] = np.nan
        self.labels = None

    def read(self, i: int):
        return (b"no image" if i == 5 else super().read(i)[0]), None


def test_several_labels_and_an_unreadable_image():
    """Targets are looked up by the image that was read in the broken one's place."""
    protocol = replace(QUICK, learning_rates=(0.01, 3.0), **EASY)
    found = run(protocol, Tagged(digits("train")))
    truth = source_targets(Tagged(digits("val", 200)))
    assert found.guesses.shape == (200, 3)
    assert quality(found.guesses, truth) > 70
    assert max(found.details["held_out_quality"]["cls"].values()) > 60


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels_and_raw_pixels(channels):
    """Grayscale and many channels; no encoder at all."""
    source = digits("train", 100)
    many = Changed(source, channels)
    of = backbone(channels=channels)
    for made in (of, replace(of, module=None, features=("pixels",))):
        sets = extracted(many, made)
        protocol = replace(QUICK, epochs=1)
        (found,) = online_probe(made, many, sets, protocol, HERE, partial(extracted, of=made))
        assert found.guesses.shape == (100, 5)
    assert found.features == "pixels"
    assert pixels(torch.zeros(1, channels, 8, 8))["pixels"].shape == (1, 64 * channels)


def test_labels_must_be_known():
    source = Subset(open_source("digits:train"), np.arange(40))
    source.labels = None
    with pytest.raises(UserError, match="digits:train has no labels"):
        run(QUICK, source)
    source.labels = np.where(np.arange(40) == 3, -1, 0)
    with pytest.raises(UserError, match="no label for 1 of 40 images"):
        run(QUICK, source)
