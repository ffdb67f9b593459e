"""Fine-tuning: rates by layer, what is loaded and what is new, draws by key, the average."""

import dataclasses
import inspect
import io
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from torch import nn
from torch.nn import functional as F

from ssl_vit.commands.cli import layered
from ssl_vit.commands.finetuning import Finetuning, parse_options
from ssl_vit.common.config import EncoderConfig, OptimConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.layers import to_yaml
from ssl_vit.common.reading import DataConfig
from ssl_vit.common.seeds import seeded
from ssl_vit.common.task import Views
from ssl_vit.data.augment import Crop
from ssl_vit.data.policy import Policy
from ssl_vit.evaluators.classifier import (
    classifier,
    classifier_writer,
    layer_scales,
    saved_step,
)
from ssl_vit.evaluators.finetune import FineTune, erase
from ssl_vit.evaluators.options import FinetuneConfig, TuneConfig, recipe
from ssl_vit.evaluators.start import Start, for_channels, open_start
from ssl_vit.model.architecture import timm_kwargs, without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.training.optim import make_optimizer, set_rates
from ssl_vit.training.resume import check_same_images, check_same_run
from ssl_vit.weights.exchange import EncoderInfo, save_encoder
from ssl_vit.weights.official import open_weights
from ssl_vit.weights.outgoing import check_ready
from ssl_vit.weights.own_files import MODEL_FILE
from tests.conftest import ROOT
from tests.unit.data.test_augment import random_crop

TINY = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(8,), patch_size=2, width=32, depth=2, heads=2
)
PLAIN = TuneConfig(
    mixup=0.0, cutmix=0.0, smoothing=0.0, erasing=0.0, drop_path=0.0, randaugment="none"
)


def start_of(config: EncoderConfig = TINY, channels: int = 3, pretrained: bool = True) -> Start:
    torch.manual_seed(1)
    encoder = Encoder(config, channels).eval()
    mean, std = (0.5,) * channels, (0.2,) * channels
    given = {"given": "made here"}
    return Start(encoder, pretrained, encoder.image_size, channels, mean, std, given)


def tuned(config: TuneConfig, classes: int = 5, start: Start | None = None) -> FineTune:
    start = start or start_of()
    size, drop_path = config.image_size, config.drop_path
    made = classifier(start, classes, config.pooling, size, drop_path, seed=3)
    return FineTune(made.network, config, classes)


def batch(n: int = 8, size: int = 8, channels: int = 3, key: int = 7) -> Views:
    generator = torch.Generator().manual_seed(key)
    images = torch.randn(n, channels, size, size, generator=generator)
    labels = torch.arange(n) % 5
    return Views([images], torch.arange(n), labels, [], key)


# --- the network --------------------------------------------------------------------------------


def test_mean_pooling_is_the_encoder_without_its_norm():
    """Blocks, then the mean of the patch tokens, then a fresh norm, then the classifier."""
    start = start_of()
    made = classifier(start, 5, "mean", (), 0.0, seed=3)
    encoder, network = start.module, made.network.eval()
    nn.init.normal_(network.head.weight)
    images = torch.randn(3, 3, 8, 8)
    tokens = encoder.with_prefix(encoder.embed(images))
    for block in encoder.vit.blocks:
        tokens = block(tokens)
    expected = F.layer_norm(tokens[:, 1:].mean(1), (32,), eps=1e-6) @ network.head.weight.T
    torch.testing.assert_close(network(images), expected)
    assert "norm.weight" not in network.state_dict()
    assert torch.equal(network.fc_norm.weight, torch.ones(32))


def test_cls_pooling_is_the_encoders_cls_and_a_classifier():
    start = start_of()
    nn.init.normal_(start.module.vit.norm.weight)
    network = classifier(start, 5, "cls", (), 0.0, seed=3).network.eval()
    nn.init.normal_(network.head.weight)
    images = torch.randn(3, 3, 8, 8)
    expected = start.module(images).cls @ network.head.weight.T
    torch.testing.assert_close(network(images), expected)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_pretrained_start_has_a_small_new_head_and_positions_that_learn(pooling):
    """Drawn anew for each seed; scratch keeps what timm gives, which is larger."""
    config = dataclasses.replace(TINY, positions="sincos")
    made = classifier(start_of(config), 1000, pooling, (), 0.1, seed=3)
    head = made.network.head
    assert float(head.weight.std()) == pytest.approx(2e-5, rel=0.05)
    assert not head.bias.any()
    assert made.network.pos_embed.requires_grad
    assert torch.equal(made.network.pos_embed, start_of(config).module.vit.pos_embed)
    other = classifier(start_of(config), 1000, pooling, (), 0.1, seed=4)
    assert not torch.equal(other.network.head.weight, head.weight)
    scratch = classifier(start_of(config, pretrained=False), 1000, pooling, (), 0.1, seed=3)
    assert float(scratch.network.head.weight.std()) > 1e-3
    assert made.network.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)


def test_nothing_else_may_be_missing():
    start = start_of()
    del start.module.vit.blocks[1]
    start.module.config = TINY
    with pytest.raises(UserError, match=r"of \d+ tensors match: 1\d missing .*blocks.1"):
        classifier(start, 5, "mean", (), 0.0, seed=3)


@pytest.mark.parametrize("size", [(12,), (8, 12)])
def test_positions_are_resampled_to_larger_images(size):
    start = start_of()
    network = classifier(start, 5, "cls", size, 0.0, seed=3).network.eval()
    images = torch.randn(2, 3, size[0], size[-1])
    nn.init.normal_(network.head.weight)
    expected = start.module(images).cls @ network.head.weight.T
    torch.testing.assert_close(network(images), expected)


def test_an_encoder_with_its_norm_after_the_pooling_keeps_it():
    """One that was fine-tuned before, by its mean: the norm is its own, not a new one."""
    start = start_of(dataclasses.replace(TINY, norm="pooled"))
    nn.init.normal_(start.module.vit.fc_norm.weight)
    made = classifier(start, 5, "mean", (), 0.0, seed=3)
    assert torch.equal(made.network.fc_norm.weight, start.module.vit.fc_norm.weight)
    assert made.loaded.endswith("new: head.bias, head.weight")


def test_what_a_network_does_not_allow():
    with pytest.raises(UserError, match=r"--tune.image-size is 7; .*patch size, 2"):
        classifier(start_of(), 5, "mean", (7,), 0.0, seed=3)
    start = start_of()
    start.module.vit.cls_token = None
    with pytest.raises(UserError, match=r"--tune.pooling is 'cls'; this encoder has no"):
        classifier(start, 5, "cls", (), 0.0, seed=3)


@pytest.mark.parametrize("channels", [1, 5])
def test_the_file_opens_in_plain_timm(tmp_path, channels):
    made = classifier(start_of(channels=channels), 5, "mean", (12,), 0.2, seed=3)
    path = tmp_path / MODEL_FILE
    assert saved_step(path) is None
    classifier_writer(path, made.network, made.call, {"step": 9})()
    assert saved_step(path) == 9
    network = timm.create_model(made.call.arch, **made.call.kwargs)
    network.load_state_dict(load_file(path), strict=True)
    images = torch.randn(2, channels, 12, 12)
    assert torch.equal(network.eval()(images), made.network.eval()(images))


@pytest.mark.parametrize("arch", ["resnet10t", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_other_networks_of_timm(arch):
    """All of the network is loaded but its classifier; each layer has its rate."""
    torch.manual_seed(0)
    module = timm.create_model(arch, num_classes=0)
    size = tuple(module.pretrained_cfg["input_size"][1:])
    start = Start(module, True, size, 3, (0.5,) * 3, (0.2,) * 3, {"given": arch}, arch)
    made = classifier(start, 5, "mean", (), 0.1, seed=3)
    own = made.network.state_dict()
    same = [k for k, v in module.state_dict().items() if torch.equal(v, own[k])]
    assert len(same) == len(module.state_dict()) == len(own) - 2
    assert float(made.network.get_classifier().weight.std()) < 3e-5
    task = FineTune(made.network, TuneConfig(layer_decay=0.5), 5)
    scales = {task.lr_scale(f"network.{n}") for n, _ in made.network.named_parameters()}
    assert max(scales) == 1.0
    assert len(scales) > 2


def test_from_scratch_is_a_function_of_the_seed():
    first, again, other = (open_start("none", TINY, 1, seed) for seed in (0, 0, 1))
    states = [s.module.state_dict() for s in (first, again, other)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])
    assert not first.pretrained
    assert first.mean == ()


# --- rates and decay ----------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_parameter_of_a_vit_b_has_its_rate_and_decay(pooling):
    """The rule of MAE's fine-tuning, written as a loop over names."""
    with without_memory():
        pool = {"mean": "avg", "cls": "token"}[pooling]
        network = timm.create_model(
            "vit_base_patch16_224", num_classes=10, global_pool=pool, reg_tokens=2
        )
    task = FineTune(network, dataclasses.replace(PLAIN, layer_decay=0.65), 10)
    config = OptimConfig(lr=2.0, weight_decay=0.3)
    optimizer = make_optimizer(task, config)
    set_rates(optimizer, 1.0, 0.3)
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[parameter] = group["lr"], group["weight_decay"]
    count = 0
    for name, parameter in network.named_parameters():
        if name in ("cls_token", "pos_embed", "reg_token") or name.startswith("patch_embed."):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            assert name.split(".")[0] in ("norm", "fc_norm", "head")
            layer = 13
        plain = parameter.ndim == 1 or name in ("cls_token", "pos_embed", "reg_token")
        assert found[parameter] == (0.65 ** (13 - layer), 0.0 if plain else 0.3), name
        count += 1
    assert count == len(found) == 153


def test_layers_without_decay_have_one_rate():
    network = classifier(start_of(), 5, "mean", (), 0.0, seed=3).network
    assert set(layer_scales(network, 1.0).values()) == {1.0}


# --- the step -----------------------------------------------------------------------------------


def test_seeded_generators_are_as_they_were_after():
    """Also after an error; within, they are a function of the key."""
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    drawn = []
    for key in (2**62 + 5, 2**62 + 5, 6):
        with pytest.raises(RuntimeError, match="within"), seeded(key):  # noqa: PT012
            drawn.append((random.random(), np.random.rand()))
            raise RuntimeError("within")
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0]
    assert drawn[0][1] != drawn[2][1]
    assert (random.random(), np.random.rand()) == expected


def step(task: FineTune, views: Views) -> dict[str, torch.Tensor]:
    """One forward of a copy of ``views``, which the task may overwrite, in training mode."""
    copied = dataclasses.replace(views, crops=[c.clone() for c in views.crops])
    torch.manual_seed(5)
    return task.train()(copied, 0)


def test_unmixed_loss_is_cross_entropy_with_smoothing():
    task = tuned(dataclasses.replace(PLAIN, smoothing=0.2))
    nn.init.normal_(task.network.head.weight)
    views = batch()
    logits = task.network(views.crops[0])
    found = step(task, views)
    expected = F.cross_entropy(logits, views.labels, label_smoothing=0.2)
    torch.testing.assert_close(found["loss"], expected)
    assert float(found["accuracy"]) == float((logits.argmax(1) == views.labels).float().mean())


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_follows_from_the_batchs_key_alone(alphas):
    """Whatever state Python's and numpy's generators are in."""
    task = tuned(dataclasses.replace(PLAIN, mixup=alphas[0], cutmix=alphas[1], erasing=0.9))
    nn.init.normal_(task.network.head.weight)
    losses = []
    for state in (0, 1):
        random.seed(state)
        np.random.seed(state)
        losses.append(float(step(task, batch())["loss"]))
    assert losses[0] == losses[1]
    others = {float(step(task, dataclasses.replace(batch(), key=k))["loss"]) for k in range(8)}
    assert len(others) > 4


def test_mixup_is_the_formula():
    """One lambda of Beta(alpha, alpha) for the batch, which is mixed with itself reversed."""
    task = tuned(dataclasses.replace(PLAIN, mixup=0.8, smoothing=0.1))
    nn.init.normal_(task.network.head.weight)
    views = batch()
    with seeded(views.key):
        np.random.rand()
        share = float(np.random.beta(0.8, 0.8))
    images = views.crops[0] * share + views.crops[0].flip(0) * (1 - share)
    target = F.one_hot(views.labels, 5) * 0.9 + 0.1 / 5
    target = target * share + target.flip(0) * (1 - share)
    expected = F.cross_entropy(task.network(images), target)
    torch.testing.assert_close(step(task, views)["loss"], expected)


NAN = float("nan")
OUTCOMES = torch.tensor([[1, 0, NAN], [0, 1, 1], [1, 1, 0], [0, 0, 1]] * 2).float()


def several(config: TuneConfig) -> tuple[FineTune, Views]:
    """A task of three labels an image, and a batch of rows of its outcomes."""
    start = start_of()
    made = classifier(start, 3, config.pooling, (), 0.0, seed=3)
    nn.init.normal_(made.network.head.weight)
    rows = torch.tensor([7, 0, 3, 3, 5, 2, 1, 6])
    views = dataclasses.replace(batch(), labels=rows)
    return FineTune(made.network, config, 3, OUTCOMES), views


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_several_labels_are_binary_cross_entropies(smoothing):
    """Each label a yes or no; an unknown one adds nothing."""
    task, views = several(dataclasses.replace(PLAIN, smoothing=smoothing))
    logits = task.network(views.crops[0])
    total = 0.0
    for logit, row in zip(logits, views.labels, strict=True):
        for value, outcome in zip(logit, OUTCOMES[row], strict=True):
            if not outcome.isnan():
                target = outcome * (1 - smoothing) + smoothing / 2
                share = value.sigmoid()
                total = total - target * share.log() - (1 - target) * (1 - share).log()
    found = step(task, views)
    torch.testing.assert_close(found["loss"], total / logits.numel())
    assert found.keys() == {"loss"}


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)])
def test_outcomes_are_mixed_as_their_images_are(alphas):
    """Shares of both images' outcomes; unknown where one of the two is."""
    config = dataclasses.replace(PLAIN, mixup=alphas[0], cutmix=alphas[1], smoothing=0.1)
    task, views = several(config)
    with seeded(views.key):
        images, shares = Mixup(*alphas, label_smoothing=0.0, num_classes=8)(
            views.crops[0].clone(), torch.arange(8)
        )
    own, other = OUTCOMES[views.labels], OUTCOMES[views.labels].flip(0)
    weight = shares.diag()[:, None]
    mixed = own * weight + other * (1 - weight)  # NaN of either stays
    logits = task.network(images)
    known = (~mixed.isnan()).float()
    smooth = mixed.nan_to_num() * 0.9 + 0.1 / 2
    expected = F.binary_cross_entropy_with_logits(logits, smooth, known)
    torch.testing.assert_close(step(task, views)["loss"], expected)
    assert 0 < float(known.mean()) < 1


def test_erasing_changes_some_images_by_rectangles():
    with seeded(0):
        images = erase(torch.zeros(400, 3, 16, 16), 0.25)
    changed = images.ne(0).flatten(1).any(1)
    assert 0.15 < float(changed.float().mean()) < 0.35
    for image in images[changed]:
        inside = image.ne(0).all(0)
        rows, columns = inside.any(1), inside.any(0)
        assert inside.sum() == rows.sum() * columns.sum()
        assert 0.01 < float(inside.float().mean()) < 0.4


def test_losses_are_float32_under_bfloat16():
    task = tuned(PLAIN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert step(task, batch())["loss"].dtype == torch.float32


# --- the average --------------------------------------------------------------------------------


def test_the_average_follows_the_weights_and_is_judged():
    """A closed form over three steps; buffers are copied; a skipped step moves nothing."""
    module = timm.create_model("resnet10t", num_classes=0)
    start = Start(module, True, (32, 32), 3, (), (), {"given": "x"}, "resnet10t")
    task = tuned(dataclasses.replace(PLAIN, ema=0.9), start=start)
    assert task.evaluated is task.average
    name = "bn1.weight"
    expected = task.average.get_parameter(name).clone()
    for i in range(3):
        with torch.no_grad():
            task.network.get_parameter(name).fill_(float(i))
            task.network.bn1.running_mean.fill_(float(i))
        expected = 0.9 * expected + 0.1 * float(i)
        task.after_update(i, torch.tensor(True))
    torch.testing.assert_close(task.average.get_parameter(name).data, expected.data)
    assert float(task.average.bn1.running_mean[0]) == 2.0
    task.network.get_parameter(name).data.fill_(100.0)
    task.after_update(3, torch.tensor(False))
    torch.testing.assert_close(task.average.get_parameter(name).data, expected.data)
    assert not any(p.requires_grad for p in task.average.parameters())
    assert "average.bn1.running_mean" in task.state_dict()


def test_a_skipped_step_leaves_running_statistics_alone():
    """The forward pass has moved them already; a NaN would stay in them for good."""
    module = timm.create_model("resnet10t", num_classes=0)
    start = Start(module, True, (32, 32), 3, (), (), {"given": "x"}, "resnet10t")
    task = tuned(PLAIN, start=start).train()
    views = batch(size=32)
    before = {k: v.clone() for k, v in task.network.named_buffers()}
    good = views.crops[0].clone()
    views.crops[0][0, 0, 0, 0] = torch.nan
    task(views, 0)
    assert task.network.bn1.running_mean.isnan().any()
    task.after_update(0, torch.tensor(False))
    for name, value in task.network.named_buffers():
        assert torch.equal(value, before[name]), name
    views.crops[0] = good
    task(views, 1)
    task.after_update(1, torch.tensor(True))
    assert not torch.equal(task.network.bn1.running_mean, before["bn1.running_mean"])


def test_without_an_average_the_network_is_judged():
    task = tuned(PLAIN)
    assert task.evaluated is task.network
    assert not any(name.startswith("average") for name in task.state_dict())


# --- RandAugment --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_follows_from_its_key(channels):
    """And is timm's with the parameters of timm's own pipeline."""
    text, mean = "rand-m7-mstd0.5-inc1", (0.3, 0.5, 0.7)[:channels]
    policy = Policy(text, mean)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (channels, 24, 20), generator=generator, dtype=torch.uint8)
    parameters = {"translate_const": 9, "interpolation": 3}
    parameters["img_mean"] = tuple(round(255 * m) for m in mean)
    theirs = rand_augment_transform(text, parameters)
    made = [policy(image, key) for key in range(60)]
    for key, found in enumerate(made):
        assert torch.equal(found, policy(image, key))
        pixels = image[0] if channels == 1 else image.permute(1, 2, 0)
        with seeded(key):
            changed = np.array(theirs(Image.fromarray(pixels.contiguous().numpy())))
        expected = torch.from_numpy(changed)
        assert torch.equal(found, expected[None] if channels == 1 else expected.permute(2, 0, 1))
    assert sum(torch.equal(m, image) for m in made) < 40


def test_randaugment_at_full_magnitude():
    """timm then keeps 0 bits of an image, which newer versions of Pillow refuse."""
    policy = Policy("rand-m10-p1-inc1", (0.5,))
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    assert any(not policy(image, key).any() for key in range(60))


@pytest.mark.parametrize("text", ["augmix", "rand-q", "rand-mx", "", "rand-m9-n", "rand-mstd1.2.3"])
def test_unknown_policies(text):
    with pytest.raises(UserError, match=r"RandAugment is .*; allowed: .*rand-m9-mstd0.5-inc1"):
        Policy(text, (0.5,))


def test_the_policy_comes_after_the_crop_and_only_where_it_can():
    crop = Crop((8, 8), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=1.0)
    policy = Policy("rand-m9-n6-p1-inc1", (0.5,) * 3)
    with_policy = dataclasses.replace(crop, policy=policy)
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    rng = random.Random(4)
    cropped = random_crop(image, crop, rng)
    assert torch.equal(cropped, image.flip(-1))
    expected = policy(cropped, rng.getrandbits(63))
    assert torch.equal(random_crop(image, with_policy, random.Random(4)), expected)
    for other in (image.float(), image[:2]):
        found = random_crop(other, with_policy, random.Random(4))
        assert torch.equal(found, other.flip(-1))


# --- options ------------------------------------------------------------------------------------


def test_recipes_by_depth():
    """Base rate, layer decay, drop path, length, pooling."""

    def numbers(pretrained, depth):
        config = recipe(pretrained, depth, 1)
        assert config.data.channels == 1
        tune, optim = config.tune, config.optim
        assert (optim.batch_size, optim.weight_decay, optim.warmup) == (1024, 0.05, "5ep")
        assert (tune.mixup, tune.cutmix, tune.smoothing, tune.erasing) == (0.8, 1.0, 0.1, 0.25)
        rates = optim.base_lr, optim.min_lr
        return (*rates, tune.layer_decay, tune.drop_path, config.run.length, tune.pooling)

    assert numbers(True, 12) == (5e-4, 1e-6, 0.65, 0.1, "100ep", "mean")
    assert numbers(True, 2) == numbers(True, None) == numbers(True, 12)
    assert numbers(True, 24) == (1e-3, 1e-6, 0.75, 0.2, "50ep", "mean")
    assert numbers(True, 32) == (1e-3, 1e-6, 0.75, 0.3, "50ep", "mean")
    assert numbers(False, 24) == (2.5e-4, 1e-5, 1.0, 0.1, "300ep", "cls")
    assert recipe(False, 12).optim.peak_lr == pytest.approx(5e-4 * 1024 / 512)
    assert recipe(True, 12) == FinetuneConfig()


def test_the_laptop_recipe_parses_and_says_its_command():
    path = ROOT / "configs" / "finetune_cifar10.yaml"
    assert "evaluate finetune --config finetune_cifar10" in path.read_text().split("\nrun:")[0]
    config = layered(FinetuneConfig(), [path], [], "prog", "", FinetuneConfig)
    assert config.run.length == "10ep"
    assert config.tune.mixes


@pytest.mark.parametrize(
    ("name", "pretrained", "depth"),
    [("vit_b16", True, 12), ("vit_l16", True, 24), ("scratch_vit_s16", False, 12)],
)
def test_the_files_of_recipes_say_what_the_recipes_are(name, pretrained, depth):
    path = ROOT / "configs" / f"finetune_{name}.yaml"
    assert "-m ssl_vit.evaluate finetune" in path.read_text().split("\nrun:")[0]
    config = layered(FinetuneConfig(), [path], [], "prog", "", FinetuneConfig)
    known = recipe(pretrained, depth)
    assert (config.tune, config.optim) == (known.tune, known.optim)
    assert config.run.length == known.run.length


@pytest.mark.parametrize(
    "options",
    [
        {"drop_path": 1.0},
        {"layer_decay": 0.0},
        {"layer_decay": 1.1},
        {"mixup": -0.1},
        {"cutmix": -1.0},
        {"smoothing": 1.0},
        {"erasing": 1.5},
        {"flip": -0.5},
        {"ema": 1.0},
        {"crop_scale": (0.5, 0.2)},
        {"crop_scale": (0.0, 1.0)},
        {"image_size": (8, 8, 8)},
    ],
)
def test_values_out_of_range_are_refused_by_name(options):
    flag = f"--tune.{next(iter(options)).replace('_', '-')}"
    with pytest.raises(UserError, match=rf"{flag} is "):
        TuneConfig(**options)


def test_every_option_has_its_meaning():
    source = inspect.getsource(TuneConfig)
    for field in dataclasses.fields(TuneConfig):
        assert re.search(rf'^    {field.name}:[^\n]*\n    """.+', source, re.M), field.name


def test_the_timm_call_is_the_encoders_with_a_classifier():
    made = classifier(start_of(channels=1), 7, "cls", (), 0.3, seed=0)
    expected = timm_kwargs(TINY, 1) | {"num_classes": 7, "global_pool": "token"}
    assert made.call.kwargs == expected
    assert made.call.arch == TINY.arch


def test_a_start_for_other_channels(caplog):
    """Filters are adapted, which is said and kept; statistics are those of the new images."""
    caplog.set_level("INFO")
    start = start_of()
    found = for_channels(start, 4, "mean")
    old, new = (s.module.vit.patch_embed.proj.weight for s in (start, found))
    torch.testing.assert_close(new[:, 3], old.mean(1) * 3 / 4)
    assert (found.channels, found.mean, found.std) == (4, (), ())
    assert found.identity["adapted"] == [
        "filters of 4 channels: red, green, blue, mean, all times 3/4"
    ]
    assert found.identity["adapted"][0] in caplog.text
    assert classifier(found, 5, "mean", (), 0.0, seed=0).network.patch_embed.proj.in_channels == 4
    assert for_channels(start, 3, "mean") is start
    turned = for_channels(start, 3, "blue,green,red")
    assert torch.equal(turned.module.vit.patch_embed.proj.weight, old.flip(1))
    assert turned.mean == start.mean
    network = dataclasses.replace(start, module=torch.nn.Identity())
    with pytest.raises(UserError, match="takes images of 3, and only plain ViTs are adapted"):
        for_channels(network, 4, "mean")


def test_images_of_other_channels_are_fine_tuned(tmp_path):
    """By the options: the given encoder's statistics are then not its own."""
    encoder = start_of().module
    info = EncoderInfo(TINY, 3, (0.1,) * 3, (0.2,) * 3)
    save_encoder(tmp_path / "encoder.safetensors", encoder, info)
    flags = ["--encoder", str(tmp_path), "--data.train", "digits", "--data.channels", "1"]
    config, start = parse_options([*flags, "--tune.channels", "green"])
    filters = start.module.vit.patch_embed.proj.weight
    torch.testing.assert_close(filters[:, 0], 3 * encoder.vit.patch_embed.proj.weight[:, 1])
    assert (config.data.channels, config.data.mean) == (1, ())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_fine_tuned_file_opens_as_an_encoder(tmp_path, pooling):
    made = classifier(start_of(), 5, pooling, (12,), 0.0, seed=0)
    info = EncoderInfo(made.encoder, 3, (0.1,) * 3, (0.2,) * 3, "finetune", 7)
    path = tmp_path / MODEL_FILE
    classifier_writer(path, made.network, made.call, {"step": 7}, info)()
    opened = open_weights(tmp_path)
    assert opened.info == info
    assert "left out: the classifier" in opened.report
    assert opened.encoder.image_size == (12, 12)
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        head = made.network.eval().forward_head(
            made.network.forward_features(images), pre_logits=True
        )
        torch.testing.assert_close(opened.encoder(images).pool(pooling), head)
    with pytest.raises(UserError, match="not an export to timm"):  # no encoder's file to replace
        check_ready("timm", path)


def test_an_option_that_a_run_did_not_have_had_its_default(tmp_path):
    config = FinetuneConfig()
    tree = yaml.safe_load(to_yaml(config))
    del tree["tune"]["ema"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    check_same_run(config, tmp_path)
    changed = dataclasses.replace(config, tune=TuneConfig(ema=0.9))
    with pytest.raises(UserError, match=r"--tune\.ema is 0\.9, but .* started with 0.0"):
        check_same_run(changed, tmp_path)


def test_files_in_another_place_may_be_the_same(tmp_path):
    """Known by content; where that is not known, the options' words count as before."""
    config = FinetuneConfig(encoder="run", data=DataConfig(train="flat:a", val="flat:b"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, train="flat:c"))
    check_same_run(moved, tmp_path, {"data.train": True})
    with pytest.raises(UserError, match=r"'flat:c', .*'flat:a', with other content; give"):
        check_same_run(moved, tmp_path, {"data.train": False})
    with pytest.raises(UserError, match=r"'flat:c', .*'flat:a'; give"):
        check_same_run(moved, tmp_path)
    held_out = dataclasses.replace(config, data=dataclasses.replace(config.data, val="flat:c"))
    check_same_run(held_out, tmp_path)
    with pytest.raises(UserError, match=r"--data\.val"):
        check_same_run(held_out, tmp_path, {"data.val": False})
    check_same_run(dataclasses.replace(config, encoder="copy"), tmp_path, {"encoder": True})
    with pytest.raises(UserError, match=r"--encoder is 'copy'"):
        check_same_run(dataclasses.replace(config, encoder="copy"), tmp_path)


def labelled_shard(path: Path, label: int) -> str:
    """Four images in two classes, the last of which has this label."""
    with tarfile.open(path, "w") as archive:
        for i in range(4):
            image = io.BytesIO()
            np.save(image, np.full((8, 8), i, dtype=np.uint8))
            text = str(label if i == 3 else i % 2).encode()
            for name, content in ((f"{i}.npy", image.getvalue()), (f"{i}.cls", text)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return f"tar:{path}"


def test_a_run_knows_its_labels_and_its_encoder(tmp_path):
    """Those that fine-tuning needs, and pretraining does not."""
    found = []
    for name, label in (("a", 1), ("b", 1), ("c", 0)):
        spec = labelled_shard(tmp_path / f"{name}.tar", label)
        flags = ["--encoder", "none", "--scratch.image-size", "8", "--scratch.patch-size", "2"]
        flags += ["--data.train", spec, "--data.val", spec, "--data.channels", "1"]
        flags += [
            "--optim.batch-size",
            "2",
            "--run.out",
            "run",
            "--data.mean",
            "0",
            "--data.std",
            "1",
        ]
        found.append(Finetuning(*parse_options(flags)).fingerprint)
    first, same, other = found
    assert same == first
    assert other["content"] == first["content"]
    with pytest.raises(UserError, match="the images have changed since here was written: other la"):
        check_same_images(other, first, Path("here"))
    check_same_images(same, first, Path("here"))
    assert first["weights"] == {}


def test_options_of_scratch_that_would_do_nothing():
    with pytest.raises(UserError, match="--scratch is for --encoder none"):
        FinetuneConfig(encoder="run", scratch=EncoderConfig(depth=3))
    with pytest.raises(UserError, match=r"--tune\.drop-path"):
        FinetuneConfig(encoder="none", scratch=EncoderConfig(drop_path=0.1))
