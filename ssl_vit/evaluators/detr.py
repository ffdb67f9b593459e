"""DETR: a detector that predicts a set of boxes at once (Carion et al. 2020), on patch tokens.

The decoder layers and the matcher are those of transformers. The encoder of DETR, a CNN and six
layers, is the network that is evaluated; there is no dropout, as what is learned must not depend on
how many processes share a batch. Accumulated parts have a mean over objects each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, clip_boxes_to_image, generalized_box_iou_loss

from ssl_vit.common.distributed import all_reduce_mean
from ssl_vit.common.task import at_least_fp32
from ssl_vit.evaluators.detect_options import DETR_HEADS, check_transformers
from ssl_vit.evaluators.detector import Target
from ssl_vit.evaluators.detector_body import DetectorBody

LAYERS = 6
"""Decoder layers, each of which predicts, and learns from a loss of its own."""
_HIDDEN = 8  # hidden features of a layer, in units of its width
_NOTHING = 0.1  # weight of queries without an object in the loss of classes
_WEIGHTS = (1.0, 5.0, 2.0)  # of classes, boxes' edges and their overlap: of losses and of matching
_LEAST = 1e-6

Pairs = list[tuple[Int64[Tensor, " k"], Int64[Tensor, " k"]]]
"""Queries of each image, and the objects that they are matched with."""
Matcher = Callable[[dict[str, Tensor], list[Target]], Pairs]


class Guess(NamedTuple):
    """Predictions of queries: classes, of which 0 is no object, and boxes (centre, width, height)
    as shares of the frame."""

    logits: Float[Tensor, "b q c"]
    boxes: Float[Tensor, "b q 4"]


class DetrSizes(NamedTuple):
    """Sizes of a DETR: width of its decoder, queries, and detections of an image at most."""

    width: int = 256
    queries: int = 100
    detections: int = 100


class Detr(nn.Module):
    """DETR of ``classes`` classes beside none, for images within a frame of ``size``.

    Positions and boxes are those in the frame; tokens without any pixel are not attended to.
    """

    matcher: Matcher

    def __init__(
        self, backbone: DetectorBody, classes: int, size: tuple[int, int], sizes: DetrSizes
    ) -> None:
        from transformers.loss.loss_for_object_detection import HungarianMatcher
        from transformers.models.detr import modeling_detr as parts

        super().__init__()
        width = sizes.width
        self.backbone, self.size, self.most = backbone, size, sizes.detections
        options: dict[str, Any] = {
            "d_model": width,
            "decoder_ffn_dim": _HIDDEN * width,
            "decoder_attention_heads": DETR_HEADS,
            "dropout": 0.0,
            "attn_implementation": "sdpa",
        }
        layer = parts.DetrConfig(**options)
        self.project = nn.Linear(backbone.body.widths[-1], width)
        self.positions = parts.DetrSinePositionEmbedding(width // 2, normalize=True)
        self.queries = nn.Parameter(torch.randn(sizes.queries, width))
        self.layers = nn.ModuleList(parts.DetrDecoderLayer(layer) for _ in range(LAYERS))
        for weight in self.layers.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, classes + 1)
        self.regress = parts.DetrMLPPredictionHead(width, width, 4, 3)
        self.matcher = HungarianMatcher(*_WEIGHTS)

    def forward(
        self, images: Float[Tensor, "b c h w"], missing: Bool[Tensor, "b c h w"] | None = None
    ) -> list[Guess]:
        """Predictions of each decoder layer; the last ones count. ``missing``: pixels that are."""
        found = self.backbone(images)[-1]
        grid = (found.shape[2], found.shape[3])
        tokens = self.project(found.flatten(2).transpose(1, 2))
        seen = None if missing is None else seen_tokens(missing, grid)[:, None, None]
        places, queries = self._places(grid), self.queries.expand(len(images), -1, -1)
        x, guesses = torch.zeros_like(queries), []
        for layer in self.layers:
            x = layer(x, None, places, queries, tokens, encoder_attention_mask=seen)
            known = self.norm(x)
            logits, edges = (at_least_fp32(part(known)) for part in (self.classify, self.regress))
            guesses.append(Guess(logits, edges.sigmoid()))
        return guesses

    def _places(self, grid: tuple[int, int]) -> Float[Tensor, "1 n d"]:
        """Sine positions of the tokens."""
        like = self.queries
        ones = torch.ones(1, *grid, device=like.device, dtype=like.dtype)
        made = self.positions(torch.Size((1, 1, *grid)), like.device, like.dtype, ones)
        found: Tensor = made.flatten(2).transpose(1, 2)
        return found

    def losses(
        self, images: Tensor, missing: Tensor | None, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Losses of a batch by name; boxes of ``targets`` are in pixels of the frame (left, top,
        right, bottom), their labels count from 1."""
        height, width = self.size
        scale = images.new_tensor([width, height, width, height])
        shares = [
            {
                "class_labels": target["labels"],
                "boxes": box_convert(target["boxes"] / scale, "xyxy", "cxcywh"),
            }
            for target in targets
        ]
        return set_losses(self(images, missing), shares, self.matcher)

    def detections(
        self, images: Tensor, missing: Tensor | None, sizes: Sequence[Sequence[int]]
    ) -> list[Target]:
        """Detections in each image, as torchvision's detectors give them, best first: of each query
        its likeliest class; in pixels of the frame. ``sizes``: heights and widths of the images,
        which lie in its top left corner."""
        height, width = self.size
        guess = self(images, missing)[-1]
        boxes = box_convert(guess.boxes, "cxcywh", "xyxy")
        boxes = boxes * boxes.new_tensor([width, height, width, height])
        best, labels = guess.logits.softmax(-1)[..., 1:].max(-1)
        found = []
        for scores, kinds, edges, (h, w) in zip(best, labels + 1, boxes, sizes, strict=True):
            order = scores.argsort(descending=True, stable=True)[: self.most]
            kept = clip_boxes_to_image(edges[order], (h, w))
            found.append({"boxes": kept, "labels": kinds[order], "scores": scores[order]})
        return found


def seen_tokens(missing: Bool[Tensor, "b c h w"], grid: tuple[int, int]) -> Bool[Tensor, "b n"]:
    """True for tokens with a pixel that is there; for all of an image that has none."""
    there = (~missing.all(1, keepdim=True)).float()
    seen = F.adaptive_max_pool2d(there, grid).flatten(1) > 0
    return seen | ~seen.any(1, keepdim=True)


def set_losses(
    guesses: Sequence[Guess], targets: list[Target], matcher: Matcher
) -> dict[str, Tensor]:
    """Losses of the last layer: ``class``, ``box`` (edges) and ``giou`` (overlap); and
    ``auxiliary``, the sum of all these of the layers before it, each with its own matching.

    Classes are a weighted mean over queries, the others sums over matched boxes divided by the
    number of objects; both are means over all processes.
    """
    batch, queries = guesses[0].logits.shape[:2]
    counts = [len(target["boxes"]) for target in targets]
    pairs = sum(min(count, queries) for count in counts)
    weights = pairs + _NOTHING * (batch * queries - pairs)
    like = guesses[0].logits
    totals = all_reduce_mean(like.new_tensor([weights, sum(counts)])).clamp(min=_LEAST)
    sums = torch.stack([_sums(guess, targets, matcher) for guess in guesses])
    losses = sums * like.new_tensor(_WEIGHTS) / totals[[0, 1, 1]]
    names = ("class", "box", "giou")
    return dict(zip(names, losses[-1], strict=True)) | {"auxiliary": losses[:-1].sum()}


def _sums(guess: Guess, targets: list[Target], matcher: Matcher) -> Float[Tensor, " 3"]:
    """Sums of a layer: of classes over queries, of edges and of overlaps over matched boxes."""
    logits, device = guess.logits, guess.logits.device
    pairs = matched(guess, targets, matcher)
    image = torch.cat([torch.full_like(q, n) for n, (q, _) in enumerate(pairs)]).to(device)
    query = torch.cat([q for q, _ in pairs]).to(device)
    labels, boxes = (
        torch.cat([t[name][o.to(device)] for t, (_, o) in zip(targets, pairs, strict=True)])
        for name in ("class_labels", "boxes")
    )
    wanted = torch.zeros(logits.shape[:2], dtype=torch.long, device=device)
    wanted[image, query] = labels
    weights = logits.new_ones(logits.shape[-1])
    weights[0] = _NOTHING
    found, boxes = guess.boxes[image, query], boxes.to(guess.boxes.dtype)
    corners = (box_convert(b, "cxcywh", "xyxy") for b in (found, boxes))
    return torch.stack(
        [
            F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weights, reduction="sum"),
            F.l1_loss(found, boxes, reduction="sum"),
            generalized_box_iou_loss(*corners, reduction="sum"),
        ]
    )


@torch.no_grad()
def matched(guess: Guess, targets: list[Target], matcher: Matcher) -> Pairs:
    """Cheapest pairs of queries and objects of each image; the matcher itself takes no box that is
    not a number, of which the loss tells the loop."""
    return matcher({"logits": guess.logits, "pred_boxes": guess.boxes.nan_to_num()}, targets)


def build_detr(
    backbone: DetectorBody, classes: int, size: tuple[int, int], sizes: DetrSizes, seed: int
) -> Detr:
    """DETR whose weights, but for those of the backbone, are random, a function of ``seed``.

    Raises:
        UserError: transformers is missing, or too old.
    """
    check_transformers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Detr(backbone, classes, size, sizes)
