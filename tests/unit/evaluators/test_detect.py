"""Detection: pyramids, windows, losses against loops, the optimizer's rates, scores."""

import contextlib
import io
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pycocotools import mask as library
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from torchvision.ops import box_iou, roi_align

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.seeds import fold_keys, uniform
from ssl_vit.common.task import Views
from ssl_vit.data.base import Subset
from ssl_vit.data.coco_images import JitteredObjects
from ssl_vit.data.jitter import Jitter
from ssl_vit.data.sources import open_source
from ssl_vit.evaluators.detect import Detect, Detections, Found, detect_batch, targets_of
from ssl_vit.evaluators.detect_scores import METRICS, ap_interval, evaluated, score_detections
from ssl_vit.evaluators.detector import HeadSizes, KeyedSampler, build_detector
from ssl_vit.evaluators.detector_body import set_image_size
from ssl_vit.evaluators.pyramid import SimplePyramid, backbone_of
from ssl_vit.evaluators.start import Start
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.block import recomputing_nothing
from ssl_vit.model.drop_path import batch_share
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.windows import Windows, use_windows
from ssl_vit.training.parallel import autocast, casts_kept
from tests.unit.coco_files import coco_at, content_of, written

TINY = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(32,), patch_size=8, width=32, depth=4, heads=2
)
FRAME = (64, 64)
SMALL = HeadSizes(anchors=64, proposals=32, detections=20, hidden=2)


def start_of(config=TINY, module=None) -> Start:
    torch.manual_seed(1)
    module = module or Encoder(config, 3).eval()
    size = module.image_size if isinstance(module, Encoder) else (64, 64)
    return Start(module, True, size, 3, (0.5,) * 3, (0.2,) * 3, {"given": "made here"})


def detector(masks=True, heads=SMALL, **options):
    backbone = backbone_of(start_of(), FRAME, 16, **options)
    return build_detector(backbone, 2, FRAME, masks, heads, seed=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(coco_at(tmp_path_factory.mktemp("coco"), count=6))


def batch_of(source, rows, masks=True) -> Views:
    """Views of images, normalised in the simplest way."""
    images = JitteredObjects(source, Jitter(FRAME, (0.8, 1.5), 0.5), 3, 0, masks)
    views = images.__getitems__([(0, row) for row in rows]).views
    views.crops[0] = views.crops[0].float() / 255 - 0.5
    return views


@pytest.mark.parametrize(
    ("patch", "strides"),
    [(16, (4, 8, 16, 32)), (14, (3.5, 7, 14, 28)), (8, (4, 8, 16, 32)), (32, (4, 8, 16, 32))],
)
def test_the_simple_pyramid_has_strides_4_to_32(patch, strides):
    pyramid = SimplePyramid(32, patch, 12)
    grid = (8, 16)
    assert pyramid.strides == strides
    levels = pyramid([torch.rand(2, 32, *grid)])
    shapes = [(2, 12, *(int(g * patch / s) for g in grid)) for s in strides]
    assert [tuple(level.shape) for level in levels] == shapes


def test_a_patch_of_the_finest_level_sees_one_patch_of_the_map():
    """The 3x3 convolution at the end reaches one pixel of its level further."""
    pyramid = SimplePyramid(16, 16, 8).eval()
    maps = torch.rand(1, 16, 4, 4, requires_grad=True)
    pyramid([maps])[0][0, 0, 5, 5].backward()
    seen = maps.grad[0].abs().sum(0) > 0
    assert seen[1, 1]
    assert seen.sum() == 1  # rows 4 to 6 of a level of four to each patch


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_networks_with_stages_have_an_fpn(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0).eval()
    backbone = backbone_of(start_of(module=network), (64, 96), 8)
    levels = backbone.train()(torch.rand(2, 3, 64, 96))
    assert backbone.strides == (4, 8, 16, 32, 64)
    shapes = [tuple(level.shape) for level in levels.values()]
    assert shapes == [(2, 8, 16, 24), (2, 8, 8, 12), (2, 8, 4, 6), (2, 8, 2, 3), (2, 8, 1, 2)]
    torch.stack([level.sum() for level in levels.values()]).sum().backward()
    trained = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert trained == []
    norms = backbone.norms()
    assert not any(part.training for part in norms)
    assert bool(norms) == (name == "resnet18")


def test_windows_part_the_grid():
    windows = Windows.of((5, 7), 3)
    assert [tuple(g.shape) for g in windows.groups] == [(2, 9), (1, 3), (2, 6), (1, 2)]
    assert windows.groups[0][1].tolist() == [3, 4, 5, 10, 11, 12, 17, 18, 19]
    patches = torch.cat([g.flatten() for g in windows.groups])
    assert torch.equal(patches[windows.places], torch.arange(35))


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
@pytest.mark.parametrize("fused", [False, True])
def test_windows_that_hold_all_are_global_attention(arch, fused):
    """With [CLS] and rotary positions, too; and with smaller windows each patch sees its own."""
    config = EncoderConfig(arch=arch, image_size=(32,), patch_size=8, width=32, depth=2, heads=2)
    torch.manual_seed(0)
    plain, windowed = (Encoder(config, 3).double().eval() for _ in range(2))
    windowed.load_state_dict(plain.state_dict())
    use_windows(windowed, (4, 6), 6, 0)
    for block in windowed.vit.blocks:
        block.attn.fused_attn = fused
    images = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    torch.testing.assert_close(windowed(images).patches, plain(images).patches)
    torch.testing.assert_close(windowed(images).cls, plain(images).cls)


@pytest.mark.parametrize("recomputes", [False, True])
def test_gradients_through_windows(recomputes):
    """What windows compute again in backward, within a block that does so as well or not."""
    torch.manual_seed(0)
    plain, windowed = (Encoder(TINY, 3).double().train() for _ in range(2))
    windowed.load_state_dict(plain.state_dict())
    use_windows(windowed, (4, 6), 6, 0)
    images = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    for encoder in (plain, windowed):
        for block in encoder.vit.blocks:
            block.recomputes = recomputes and encoder is windowed
        encoder(images).patches.square().sum().backward()
    for (name, one), two in zip(plain.named_parameters(), windowed.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, msg=name)


def test_windows_of_a_block_are_those_of_a_loop():
    """Each patch attends to [CLS] and the patches of its window, written as loops."""
    torch.manual_seed(0)
    encoder = Encoder(TINY, 3).double().eval()
    use_windows(encoder, (3, 5), 2, 1)
    kinds = [type(block.attn).__name__ for block in encoder.vit.blocks]
    assert kinds == ["WindowedAttention"] * 3 + ["LeanAttention"]
    attention = encoder.vit.blocks[0].attn
    x = torch.randn(1, 16, 32, dtype=torch.float64)
    q, k, v = attention.project(x)
    expected = torch.zeros_like(q)
    for head in range(2):
        for token in range(16):
            seen = list(range(16))
            if token:
                row, column = divmod(token - 1, 5)
                same = [
                    1 + r * 5 + c
                    for r in range(3)
                    for c in range(5)
                    if (r // 2, c // 2) == (row // 2, column // 2)
                ]
                seen = [0, *same]
            scores = q[0, head, token] @ k[0, head, seen].T / math.sqrt(16)
            expected[0, head, token] = scores.softmax(0) @ v[0, head, seen]
    joined = expected.transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.proj(joined))


@pytest.mark.parametrize("windows", [0, 2])
def test_a_block_may_keep_no_image(windows):
    """Stochastic depth of few images in a process leaves out all of them now and then."""
    encoder = Encoder(TINY, 3).train()
    if windows:
        use_windows(encoder, (4, 4), windows, 0)
    for block in encoder.vit.blocks:
        block.attn.fused_attn = False
    x = torch.zeros(0, 17, 32, requires_grad=True)
    out = encoder.vit.blocks[0].attn(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that live, and the most at a time (``peak``)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = WeakIdKeyDictionary(ref_type=weakref.ref)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    self.seen[storage] = True
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


def bytes_of_a_step(windows: int, arch: str = "vit_base_patch16_224") -> tuple[int, int]:
    """Most bytes that live in a forward and backward pass of an encoder on an image of 1,024
    pixels, weights' gradients included, and those that live between the two; where attention keeps
    its weights. On the meta device, where nothing is computed."""
    with without_memory():
        encoder = Encoder(EncoderConfig(arch=arch), 3).train()
        images = torch.zeros(1, 3, 1024, 1024)
    for block in encoder.vit.blocks:
        block.attn.fused_attn = False
    if windows:
        use_windows(encoder, (64, 64), windows, 4)
    with Live() as live:
        patches = encoder(images).patches
        kept = live.now
        patches.sum().backward()
    print(f"{arch}, windows {windows}: peak {live.peak / 1e9:.2f} GB, kept {kept / 1e9:.2f} GB")
    assert encoder.vit.patch_embed.proj.weight.grad is not None
    return live.peak, kept


def test_windows_need_at_most_half_the_memory_at_1024_pixels():
    everywhere, within = bytes_of_a_step(0), bytes_of_a_step(16)
    assert everywhere[1] > 12 * 12 * 4096**2 * 4  # the weights alone
    assert within[0] < everywhere[0] / 2, (within, everywhere)
    assert within[1] < everywhere[1] / 2, (within, everywhere)


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
def test_global_blocks_beside_windows_are_computed_again_in_backward(precision):
    """With the same gradients to the bit as without: also of several parts of a step, which share
    rounded weights, and with stochastic depth."""
    torch.manual_seed(0)
    encoder = Encoder(replace(TINY, drop_path=0.3), 3).train()
    encoder = encoder.double() if precision == torch.float64 else encoder
    use_windows(encoder, (4, 6), 3, 2)
    calls = [0] * 4
    for number, block in enumerate(encoder.vit.blocks):
        block.norm1.register_forward_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    images = torch.rand(2, 4, 3, 32, 48, dtype=encoder.vit.pos_embed.dtype)

    def gradients() -> list[torch.Tensor]:
        encoder.zero_grad()
        with casts_kept(images.device):
            for part in images:
                with batch_share(0, 1, 4, key=7), autocast(images.device, precision):
                    loss = encoder(part).patches.square().mean()
                loss.backward()
        return [p.grad for p in encoder.parameters()]

    again = gradients()
    assert calls == [2, 4, 2, 4]
    with recomputing_nothing(encoder):
        expected = gradients()
    assert calls == [4, 6, 4, 6]
    assert all(torch.equal(one, two) for one, two in zip(again, expected, strict=True))


@pytest.mark.parametrize(("frozen", "windows"), [(False, 2), (True, 2), (False, 0)])
def test_blocks_are_computed_again_only_for_windows_and_training(frozen, windows):
    options = {"frozen": frozen, "windows": windows, "global_blocks": 4}
    backbone = backbone_of(start_of(replace(TINY, depth=5)), FRAME, 16, **options)
    blocks, calls = backbone.body.network.vit.blocks, []
    for block in blocks:
        block.norm1.register_forward_hook(lambda *_: calls.append(1))
    sum(level.sum() for level in backbone.train()(torch.rand(1, 3, *FRAME)).values()).backward()
    assert len(calls) == (9 if windows and not frozen else 5)
    assert (blocks[0].norm1.weight.grad is None) == frozen
    backbone.eval()(torch.rand(1, 3, *FRAME))
    assert len(calls) == (14 if windows and not frozen else 10)


def test_sampling_is_a_function_of_the_image_alone():
    sampler = KeyedSampler(8, 0.5)
    matched = [torch.tensor([1.0] * 3 + [0.0] * 20 + [-1.0] * 5), torch.zeros(30)]
    matched[1][:10] = 2
    sampler.keys = torch.tensor([11, 12])
    positive, negative = sampler(matched)
    assert [int(p.sum()) for p in positive] == [3, 4]
    assert [int(n.sum()) for n in negative] == [5, 4]
    assert (sampler.sampled, sampler.positive) == (16, 7)
    assert not positive[0][3:].any()
    assert not torch.cat([negative[0][:3], negative[0][23:]]).any()
    sampler.keys = torch.tensor([12])
    alone = sampler(matched[1:])
    assert torch.equal(alone[0][0], positive[1])
    assert torch.equal(alone[1][0], negative[1])
    draws = uniform(torch.tensor([12]), 30)[0]
    assert positive[1].nonzero().flatten().tolist() == sorted(draws[:10].argsort()[:4].tolist())


def test_proposals_are_drawn_whatever_their_order():
    sampler = KeyedSampler(4, 0.5)
    sampler.keys = torch.tensor([7])
    boxes, matched = torch.rand(20, 4) * 30, (torch.arange(20) < 8).float()
    order = torch.randperm(20)
    sampler.boxes = [boxes]
    positive, negative = sampler([matched])
    sampler.boxes = [boxes[order] + 1e-6]
    moved = sampler([matched[order]])
    assert torch.equal(moved[0][0], positive[0][order])
    assert torch.equal(moved[1][0], negative[0][order])


def smooth_l1(x, beta=1 / 9):
    return x.abs() - beta / 2 if x.abs() >= beta else x * x / (2 * beta)


def encoded(box, anchor, weights):
    """Box regression targets (Girshick 2014)."""
    (x, y, w, h), (ax, ay, aw, ah) = (
        ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]) for b in (box, anchor)
    )
    found = ((x - ax) / aw, (y - ay) / ah, torch.log(w / aw), torch.log(h / ah))
    return torch.stack(found) * torch.tensor(weights)


def matched_by_loop(candidates, boxes, high, low, best):
    """Object of each candidate; -1: none, -2: between. ``best``: each object's best ones, too."""
    found = []
    overlaps = box_iou(boxes, candidates)
    for column in overlaps.T:
        top = int(column.argmax())
        value = float(column[top])
        found.append(top if value >= high else -1 if value < low else -2)
    if best:
        for row in overlaps:
            for place in (row == row.max()).nonzero().flatten().tolist():
                found[place] = int(overlaps[:, place].argmax())
    return found


def drawn_by_loop(draws, matched, size, share):
    """Positive and negative candidates that are learned from."""
    order = sorted(range(len(matched)), key=lambda n: draws[n])
    positive = [n for n in order if matched[n] >= 0][: int(size * share)]
    negative = [n for n in order if matched[n] == -1][: size - len(positive)]
    return positive, negative


def losses_by_loops(network, views):
    """The five losses, image by image and box by box; the pyramid and the heads' outputs are the
    network's own."""
    images = views.crops[0]
    targets = targets_of(views)
    levels = network.backbone(images)
    logits, deltas = network.rpn.head(list(levels.values()))
    anchors = torch.cat(own_anchors(levels))
    kept = {name: [] for name in ("objectness", "rpn_box", "class", "box", "mask")}
    counts = {"anchors": 0, "proposals": 0}
    flat = lambda maps, n: torch.cat(  # noqa: E731
        [m.unflatten(1, (3, n)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps], 1
    )
    logits, deltas = flat(logits, 1), flat(deltas, 4)
    with torch.no_grad():
        proposals, _ = network.rpn.eval()(*image_list(images, levels))
        network.rpn.train()
        # Training keeps as many proposals as evaluation does, 1000: there are fewer here.
    for i, target in enumerate(targets):
        boxes, key = target["boxes"], views.keys[i : i + 1]
        matched = matched_by_loop(anchors, boxes, 0.7, 0.3, best=True)
        draws = uniform(fold_keys(key, 1), len(matched))[0].tolist()
        chosen, others = drawn_by_loop(draws, matched, 64, 0.5)
        counts["anchors"] += len(chosen) + len(others)
        for n in chosen:
            kept["objectness"].append(F.softplus(-logits[i, n, 0]))
            wanted = encoded(boxes[matched[n]], anchors[n], (1.0, 1, 1, 1))
            kept["rpn_box"] += [smooth_l1(d) for d in deltas[i, n] - wanted]
        kept["objectness"] += [F.softplus(logits[i, n, 0]) for n in others]
        candidates = torch.cat([proposals[i], boxes])
        matched = matched_by_loop(candidates, boxes, 0.5, 0.5, best=False)
        draws = []
        for box in candidates.tolist():
            code = fold_keys(key, 2)
            for corner in box:
                code = fold_keys(code + round(2 * corner), 0)
            draws.append(float(uniform(code, 1)))
        chosen, others = drawn_by_loop(draws, matched, 32, 0.25)
        counts["proposals"] += len(chosen) + len(others)
        taken = [*chosen, *others]
        pooled = network.roi_heads.box_roi_pool(one(levels, i), [candidates[taken]], [FRAME])
        scores, regressed = network.roi_heads.box_predictor(network.roi_heads.box_head(pooled))
        of_masks = network.roi_heads.mask_roi_pool(one(levels, i), [candidates[chosen]], [FRAME])
        painted = network.roi_heads.mask_predictor(network.roi_heads.mask_head(of_masks))
        for row, n in enumerate(taken):
            kind = int(target["labels"][matched[n]]) if row < len(chosen) else 0
            kept["class"].append(-scores[row].log_softmax(0)[kind])
            if kind:
                wanted = encoded(boxes[matched[n]], candidates[n], (10.0, 10, 5, 5))
                found = regressed[row, 4 * kind : 4 * kind + 4]
                kept["box"] += [smooth_l1(d) for d in found - wanted]
                mask = target["masks"][matched[n]][None, None].float()
                cut = roi_align(mask, [candidates[n][None]], (28, 28), 1.0)[0, 0]
                drawing = painted[row, kind]
                kept["mask"].append((F.softplus(drawing) - drawing * cut).mean())
    sums = {name: torch.stack(values).sum() for name, values in kept.items()}
    return {
        "objectness": sums["objectness"] / counts["anchors"],
        "proposal_box": sums["rpn_box"] / counts["anchors"],
        "class": sums["class"] / counts["proposals"],
        "box": sums["box"] / counts["proposals"],
        "mask": sums["mask"] / len(kept["mask"]),
    }


def own_anchors(levels):
    """Anchors of each level: 8 strides large, of three shapes, at its pixels' corners."""
    made = []
    for stride, level in zip((4, 8, 16, 32, 64), levels.values(), strict=True):
        side = 8 * stride
        for row in range(level.shape[2]):
            for column in range(level.shape[3]):
                for ratio in (0.5, 1.0, 2.0):
                    h, w = side * ratio**0.5 / 2, side / ratio**0.5 / 2
                    corners = torch.tensor([-w, -h, w, h]).round()
                    place = torch.tensor([column * stride, row * stride] * 2)
                    made.append((corners + place)[None])
    return made


def one(levels, image):
    return {name: level[image : image + 1] for name, level in levels.items()}


def image_list(images, levels):
    from torchvision.models.detection.image_list import ImageList

    return ImageList(images, [FRAME] * len(images)), levels


def test_a_training_step_is_that_of_loops(source):
    """Losses of boxes, classes and masks, and the gradient of the encoder's first weights."""
    network = detector().train()
    task = Detect(network, 0.7)
    views = batch_of(source, [0, 3])
    found = task(views, 0)
    expected = losses_by_loops(network, views)
    assert found.keys() == {"loss", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    weight = network.backbone.body.network.vit.patch_embed.proj.weight
    ours = torch.autograd.grad(found["loss"], weight)[0]
    theirs = torch.autograd.grad(torch.stack(list(expected.values())).sum(), weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_new_weights_are_a_function_of_the_seed():
    made = []
    for before in (1, 2):
        torch.manual_seed(before)
        made.append(detector().state_dict())
    for name, value in made[0].items():
        assert torch.equal(value, made[1][name]), name


def test_images_without_objects_are_learned_from_too(source):
    views = batch_of(source, [0, 1])
    count = views.drawn["count"]
    first = int(count[0])
    views.drawn = {name: value[first:] for name, value in views.drawn.items()}
    views.drawn["count"] = torch.tensor([0, int(count[1])])
    found = Detect(detector().train(), 0.7)(views, 0)
    assert all(bool(value.isfinite()) for value in found.values())
    views.drawn = {name: value[:0] for name, value in views.drawn.items()}
    views.drawn["count"] = torch.tensor([0, 0])
    found = Detect(detector().train(), 0.7)(views, 0)
    found["loss"].backward()
    assert found["mask"] == found["box"] == 0


def test_rates_and_what_is_trained():
    task = Detect(detector(), 0.5)
    names = [n for n, p in task.named_parameters() if task.trains(n, p)]
    body = "network.backbone.body.network.vit."
    scales = {n: task.lr_scale(n) for n in names}
    assert scales[f"{body}patch_embed.proj.weight"] == 0.5**5
    assert scales[f"{body}blocks.3.mlp.fc1.weight"] == 0.5
    assert scales["network.rpn.head.cls_logits.weight"] == 1
    assert not task.decays(f"{body}pos_embed", task.get_parameter(f"{body}pos_embed"))
    frozen = Detect(detector(frozen=True), 0.5).train()
    trained = [n for n, p in frozen.named_parameters() if frozen.trains(n, p)]
    assert trained
    assert not any(n.startswith(body) for n in trained)
    assert not frozen.backbone.body.training
    assert frozen.backbone.neck.training


def test_wrong_sizes_are_told():
    for options, said in (
        ({"size": (60, 64)}, "--detect.image-size is 60x64; it must be divisible by the patch"),
        ({"windows": 2, "global_blocks": 9}, "--detect.global-blocks is 9; the encoder has 4"),
    ):
        with pytest.raises(UserError, match=said):
            backbone_of(start_of(), **({"size": FRAME, "channels": 8} | options))
    network = timm.create_model("resnet18", num_classes=0).eval()
    with pytest.raises(UserError, match="it is for plain ViTs"):
        backbone_of(start_of(module=network), FRAME, 8, windows=2)
    assert backbone_of(start_of(module=network), (16, 16), 8)  # it rounds sizes up


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["", "convnext_atto"])
def test_images_smaller_than_the_coarsest_level_are_told(name, frozen):
    start = start_of(module=timm.create_model(name, num_classes=0) if name else None)
    said = r"--detect.image-size is 64x16; both must be 32 or more, the stride of the coarsest"
    with pytest.raises(UserError, match=said):
        backbone_of(start, (64, 16), 8, frozen=frozen)
    levels = backbone_of(start, (32, 32), 8, frozen=frozen)(torch.rand(1, 3, 32, 32))
    assert levels["3"].shape == (1, 8, 1, 1)


def test_an_image_size_of_a_network_is_told_by_its_option():
    network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
    set_image_size(network, (64, 96), "--tune.image-size", "timm:swin")
    assert network.patch_embed.img_size == (64, 96)

    def fails(**options):
        raise AssertionError("too\nsmall")

    network.set_input_size = fails
    said = "--tune.image-size is 1x2; timm:swin does not take it: too small"
    with pytest.raises(UserError, match=said):
        set_image_size(network, (1, 2), "--tune.image-size", "timm:swin")


def test_detections_come_back_in_the_images_own_pixels():
    """Two frames of the same image at other scales have the same boxes in the original."""
    network = detector(masks=False).eval()
    images = torch.zeros(1, 3, *FRAME)
    found = {"boxes": torch.tensor([[8.0, 4, 32, 16]]), "scores": torch.tensor([0.9])}
    network.forward = lambda inner: [found | {"labels": torch.tensor([2])} for _ in inner]
    drawn = {"scaled": torch.tensor([[32, 64]]), "original": torch.tensor([[64, 192]])}
    views = Views([images], torch.tensor([5]), torch.tensor([-1]), drawn=drawn)
    (made,) = detect_batch(network, views)
    assert made.index == 5
    assert made.boxes.tolist() == [[24, 8, 96, 32]]
    assert made.classes.tolist() == [1]


def guesses(source, seed=0) -> Detections:
    """Hand-made detections: objects moved a little, some of the wrong class, some of nothing."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(len(source)):
        known = source.objects(i)
        boxes = np.concatenate(
            [known.boxes + rng.normal(0, 1.5, known.boxes.shape), [[1, 1, 9, 9]]]
        )
        boxes = torch.from_numpy(boxes).float()
        classes = torch.from_numpy(np.append(known.numbers, rng.integers(2)))
        scores = torch.from_numpy(rng.uniform(0.1, 1, len(boxes))).float()
        masks = []
        for left, top, right, bottom in boxes.round().int().clamp(0, 48).tolist():
            mask = np.zeros((48, 64), np.uint8, order="F")
            mask[top:bottom, left:right] = 1
            masks.append(dict(library.encode(mask)))
        images.append(Found(i, boxes, scores, classes, masks))
    return Detections(images, 0)


@pytest.mark.parametrize(("kind", "theirs"), [("boxes", "bbox"), ("masks", "segm")])
def test_scores_are_those_of_pycocotools_alone(source, kind, theirs):
    """On the file itself, with the results as a user of the library would give them."""
    found = guesses(source)
    results = []
    for one in found.images:
        for box, score, number, mask in zip(
            one.boxes.double(), one.scores, one.classes, one.masks, strict=True
        ):
            result = {"image_id": 10 + one.index, "category_id": [3, 7][int(number)]}
            result["score"] = float(score)
            result["bbox"] = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
            if theirs == "segm":
                del result["bbox"]
                result["segmentation"] = mask
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(Path(source.name(0)).parents[1] / "annotations.json"))
        alone = COCOeval(truth, truth.loadRes(results), theirs)
        alone.evaluate()
        alone.accumulate()
        alone.summarize()
    score = score_detections(found, source, kind, "here", 0)
    expected = dict(zip(METRICS, (100 * alone.stats[:6]).tolist(), strict=True))
    assert score.metrics == {name: v for name, v in expected.items() if v >= 0}
    assert 5 < score.value < 95
    assert score.details["without_objects"] == [n for n, v in expected.items() if v < 0]
    assert score.interval[0] <= score.value <= score.interval[1]
    assert json.loads(json.dumps(score.metrics)) == score.metrics


def test_a_crowd_may_lack_a_segmentation(tmp_path):
    """Its box stands for it: what is found there is neither right nor wrong."""
    content = content_of(tmp_path)
    for one in content["annotations"][:2]:
        one["iscrowd"] = 1
        del one["segmentation"]
    source = open_source(written(tmp_path, content))
    assert source.has_masks
    found = guesses(source)
    inside = np.zeros((48, 64), np.uint8, order="F")
    left, top, width, height = (int(v) for v in content["annotations"][0]["bbox"])
    inside[top : top + height, left : left + width] = 1
    number = torch.tensor([{3: 0, 7: 1}[content["annotations"][0]["category_id"]]])
    box = torch.tensor([[left, top, left + width, top + height]]).float()
    found.images[0] = Found(0, box[:0], torch.zeros(0), number[:0], [])
    without = score_detections(found, source, "masks", "here", 0)
    found.images[0] = Found(0, box, torch.ones(1), number, [dict(library.encode(inside))])
    assert score_detections(found, source, "masks", "here", 0).metrics == without.metrics
    assert without.value > 0


def test_the_interval_resamples_images(source, monkeypatch):
    """Each image once gives AP itself; an image twice gives that of the doubled data set."""
    from ssl_vit.evaluators import detect_scores

    with contextlib.redirect_stdout(io.StringIO()):
        made = evaluated(source, range(6), guesses(source), "bbox")
    asked = []

    def resampled(metric, units, resamples, seed):
        asked.append(units)
        return metric(np.ones(units, dtype=np.int64)), metric(np.full(units, 2))

    monkeypatch.setattr(detect_scores, "resampled", resampled)
    once, twice = ap_interval(made, 0)
    assert once == pytest.approx(100 * made.stats[0])
    assert twice == pytest.approx(once, rel=0.02)
    ap_interval(made, 0, np.array([0, 0, 1, 1, 2, 2]))
    assert asked == [6, 3]


def test_nothing_found_is_no_failure_and_subsets_are_scored_alone(source):
    part = Subset(source, np.array([1, 4]))
    none = torch.zeros(0)
    empty = [Found(i, torch.zeros(0, 4), none, none.long()) for i in range(2)]
    score = score_detections(Detections(empty, 0), part, "boxes", "here", 0)
    assert score.value == 0
    whole = guesses(source)
    chosen = [whole.images[1], whole.images[4]]
    moved = [Found(n, f.boxes, f.scores, f.classes) for n, f in enumerate(chosen)]
    alone = score_detections(Detections(moved, 0), part, "boxes", "here", 0)
    assert alone.value > 0
