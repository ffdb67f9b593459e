"""Features to embed: which of an encoder's, and how a batch becomes them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ssl_vit.commands.embed_options import EmbedConfig
from ssl_vit.common.errors import check
from ssl_vit.evaluators.backbone import Backbone
from ssl_vit.evaluators.features import Embed
from ssl_vit.evaluators.options import FEATURES, PATCHES, parts_of
from ssl_vit.model.encoder import Encoder


def chosen_features(config: EmbedConfig, backbone: Backbone) -> tuple[str, ...]:
    """Features to compute, each once.

    Raises:
        UserError: the encoder lacks one, or they are several for a .npy file.
    """
    single = Path(config.out).suffix == ".npy"
    tokens = (PATCHES,) if isinstance(backbone.module, Encoder) else ()
    given = (*backbone.features, *tokens)
    asked = tuple(dict.fromkeys(config.features))
    strange = [name for name in asked if name not in given]
    check(not strange, f"--features has {strange}; {config.encoder} has {', '.join(given)}")
    check(
        not single or len(asked) < 2,
        f"--features is {' '.join(asked)}, and a .npy file holds one array: give one of them, or "
        "--out with .npz or .parquet",
    )
    return asked or backbone.poolings[: 1 if single else None]


def embedding_of(backbone: Backbone, features: tuple[str, ...]) -> Embed:
    """Embedding function: images to these features, each (b, D); patches (b, N, D)."""
    needs = {name: FEATURES.get(name, (name,)) for name in features}
    pooled = parts_of(tuple(name for name in features if name in FEATURES))
    embed = backbone.embed((*pooled, *({PATCHES} & set(features))))

    def made(images: Tensor) -> dict[str, Tensor]:
        parts = embed(images)
        joined = {name: [parts[part] for part in own] for name, own in needs.items()}
        return {name: torch.cat(own, dim=-1) for name, own in joined.items()}

    return made
