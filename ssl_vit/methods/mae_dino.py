"""MAE and DINO together: both objectives on one encoder, each with its own crops and randomness."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.task import Views
from ssl_vit.data.augment import ViewSpec
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods.base import Method
from ssl_vit.methods.dino import DINO, DINOObjective, attention
from ssl_vit.methods.mae import MAE, MAEObjective
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.init import truncated_init, xavier_linears
from ssl_vit.options.base import Defaults
from ssl_vit.options.mae_dino import DEFAULTS, EXPLAINED, TITLE, MAEDINOConfig

_MAE, _DINO = "mae", "dino"


class MAEDINO(Method):
    """One encoder that predicts masked pixels and, as a student, a teacher's output.

    MAE has a crop of its own, with MAE's augmentations, beside DINO's.
    """

    Config: ClassVar[type] = MAEDINOConfig
    title, explained = TITLE, EXPLAINED
    pooling: ClassVar[str] = "cls"
    progress: ClassVar[tuple[str, ...]] = ("mae_loss", "dino_loss", "dino_kl")
    peak_in_warmup: ClassVar[bool] = DINO.peak_in_warmup
    defaults: ClassVar[Defaults] = DEFAULTS
    reconstructs: ClassVar[bool] = True

    def __init__(self, config: MAEDINOConfig, encoder_config: EncoderConfig, channels: int) -> None:
        super().__init__(config, encoder_config, channels)
        config.dino.sizes(self.encoder.image_size, self.encoder.patch_size)
        mae, dino = MAEObjective(config.mae, self.encoder), DINOObjective(config.dino, self.encoder)
        truncated_init(self.encoder, dino.head)
        xavier_linears(mae.decoder)
        torch.nn.init.normal_(mae.decoder.mask_token, std=0.02)
        dino.add_teacher(self.encoder)
        self.add(_MAE, mae, config.mae_weight)
        self.add(_DINO, dino, config.dino_weight)

    @staticmethod
    def views(config: MAEDINOConfig, encoder: Encoder) -> ViewSpec:
        """MAE's crop, then DINO's."""
        mae, dino = MAE.views(config.mae, encoder).crops, DINO.views(config.dino, encoder)
        phases = tuple(replace(p, spec=ViewSpec((*mae, *p.spec.crops))) for p in dino.phases)
        return ViewSpec((*mae, *dino.crops), phases=phases)

    def seen_by(self, name: str, views: Views) -> Views:
        """Crops of each objective, and keys of its own to draw from."""
        if name == _MAE:
            return views.part(slice(0, 1))
        return views.part(slice(1, None)).redrawn(1)

    def exported_encoder(self) -> Encoder:
        """The teacher's."""
        dino = self.objectives[_DINO]
        assert isinstance(dino, DINOObjective)
        return dino.teacher.encoder

    def panels(self, views: Views, normalize: Normalize) -> dict[str, np.ndarray]:
        """MAE's reconstructions and the attention of the teacher's [CLS]."""
        looks = attention(self.exported_encoder(), views, normalize)
        return super().panels(views, normalize) | looks
