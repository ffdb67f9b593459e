"""Attentive probe's picture: where its query attends in some validation images."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from ssl_vit.data.eval_images import EvalImages
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.sources import Source, Subset
from ssl_vit.evaluators.attentive_head import AttentiveHead
from ssl_vit.evaluators.token_sets import TokenSet
from ssl_vit.model.attention import attention_panel
from ssl_vit.pictures.boundaries import evenly
from ssl_vit.pictures.thumbnails import as_rgb

_SHOWN = 6


@torch.no_grad()
def query_picture(
    head: AttentiveHead, tokens: TokenSet, val: Source, index: Int64[Tensor, " n"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Query picture: the attention of a head's query in six images of ``val``, evenly spread.

    Args:
        tokens: those of the training images, by which these are read and standardised.
        index: readable images of ``val``.
    """
    reader, view = tokens.reader, tokens.reader.view
    some = Subset(val, index[evenly(len(index), _SHOWN)].numpy())
    images = EvalImages(some, view.size, view.crop_ratio, view.channels)
    crops = images.__getitems__(range(len(some))).views.crops[0]
    device = reader.machine.device
    ready = Normalize(view.mean, view.std).to(device).images(crops.clone().to(device))
    found = reader.map(ready)
    standard = tokens.standard(found.flatten(2).mT)
    attention, whose = head.attention(standard), "the probe's query"
    if head.per_class:
        best = head(standard).argmax(1)
        attention = attention[torch.arange(len(best)), :, best]
        whose = "the query of the class that the probe finds"
    else:
        attention = attention[:, :, 0]
    grid = (found.shape[2], found.shape[3])
    return attention_panel(as_rgb(crops, view), attention, grid, whose=whose)
