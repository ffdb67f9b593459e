"""DINO peers: the DINO training step of other implementations.

The original step is written from its description (Caron et al. 2021, section 3 and algorithm 1).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from ssl_vit.benchmarks.chains import OriginalChain
from ssl_vit.benchmarks.peers import Peer, check_plain, check_rotary, library, timm_vit
from ssl_vit.benchmarks.peers_dino_lightly import LightlyChain, LightlyDINO, LightlyGroupedDINO
from ssl_vit.benchmarks.side import Workload
from ssl_vit.benchmarks.teacher_student import TeacherAndStudent
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.init import truncated_linears


class OriginalDINO(TeacherAndStudent):
    """Original DINO step.

    Crops of one resolution go through the ViT together, all crops through the head together. The
    loss is computed pair by pair; gradients are clipped and the teacher is updated parameter by
    parameter. Attention is plain matrix products, in every block for all tokens.
    """

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.encoder = self._checked()
        self.center = torch.zeros(1, work.method.prototypes, device=work.device)
        self.begin_both([self._network(rate) for rate in self.drop_paths])

    def _checked(self) -> Encoder:
        return check_plain(self.work, "original", square=False)

    def _network(self, drop_path: float) -> nn.Module:
        method, vit, width = self.work.method, self.vit(drop_path), self.encoder.width
        for part in vit.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = False
        widths = [width, *[method.head_width] * (method.head_depth - 1), method.bottleneck]
        layers = [nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in pairwise(widths)]
        layers[-1].pop(-1)
        truncated_linears(*layers)
        last = weight_norm(nn.Linear(method.bottleneck, method.prototypes, bias=False))
        gain: Any = last.parametrizations.weight
        gain.original0.data.fill_(1)
        gain.original0.requires_grad_(not method.norm_last_layer)
        return nn.ModuleDict({"vit": vit, "mlp": nn.Sequential(*layers), "last": last})

    def vits(self) -> list[Any]:
        """ViTs of student and teacher."""
        return [self.networks.student["vit"], self.networks.teacher["vit"]]

    def last_layer(self) -> nn.Module:
        """The weight-normalised layer."""
        last: nn.Module = self.networks.student["last"]
        return last

    @staticmethod
    def _logits(network: Any, kinds: list[Tensor]) -> Tensor:
        features = torch.cat([network.vit(crops) for crops in kinds])
        return network.last(F.normalize(network.mlp(features), dim=-1))

    def loss(self, views: list[Tensor]) -> Tensor:
        """Cross-entropy of all pairs of different views, one pair after another."""
        method = self.work.method
        kinds = [torch.cat(views[:2]), *([torch.cat(views[2:])] if views[2:] else [])]
        with torch.no_grad():
            teacher = self._logits(self.networks.teacher, kinds[:1])
        student = (self._logits(self.networks.student, kinds) / method.student_temp).chunk(
            len(views)
        )
        targets = ((teacher - self.center) / self.teacher_temp).softmax(-1).chunk(2)
        total, pairs = torch.zeros((), device=teacher.device), 0
        for i, target in enumerate(targets):
            for v, logits in enumerate(student):
                if v != i:
                    total = total + (-target * logits.log_softmax(-1)).sum(-1).mean()
                    pairs += 1
        mean = teacher.mean(0, keepdim=True)
        share = method.center_momentum
        self.center = self.center * share + mean * (1 - share)
        return total / pairs

    def clip(self) -> None:
        """Gradient clipping of each parameter by its own norm."""
        limit = self.work.optim.clip
        for parameter in self.trained if limit > 0 else []:
            if parameter.grad is not None:
                factor = limit / (parameter.grad.norm() + 1e-6)
                if factor < 1:
                    parameter.grad.mul_(factor)
        super().clip()

    @torch.no_grad()
    def move_teacher(self) -> None:
        """EMA update, one parameter after another."""
        keep, net = self.momentum, self.networks
        for old, new in zip(net.teacher.parameters(), net.student.parameters(), strict=True):
            old.mul_(keep).add_((1 - keep) * new)


class TimmDINO(OriginalDINO):
    """Original DINO step on timm's own encoder of DINOv3, with plain attention.

    Coordinates are changed in training as ours are, but by timm: drawn once for all blocks.
    """

    def _checked(self) -> Encoder:
        return check_rotary(self.work, "timm")

    def vit(self, drop_path: float) -> Any:
        """timm's Eva, whose output is [CLS]."""
        config = self.work.encoder
        changed = {
            "rope_shift_coords": config.rope_shift or None,
            "rope_jitter_coords": config.rope_jitter or None,
            "rope_rescale_coords": config.rope_rescale or None,
        }
        return timm_vit(self.work, drop_path_rate=drop_path, global_pool="token", **changed)


class HuggingFaceDINO(OriginalDINO):
    """Original DINO step on transformers' own DINOv3, with plain attention."""

    vits = Peer.vits  # it has none

    @staticmethod
    def load() -> None:
        """Import of transformers."""
        library("huggingface", "transformers", "")

    def _checked(self) -> Encoder:
        return check_rotary(self.work, "huggingface")

    def vit(self, drop_path: float) -> Any:
        """transformers' DINOv3, whose output is [CLS]."""
        return _Cls(self._model(drop_path))

    def _model(self, drop_path: float) -> Any:
        (transformers,) = library("huggingface", "transformers", "")
        encoder, config = self.encoder, self.work.encoder
        block: Any = encoder.vit.blocks[0]
        gated = hasattr(block.mlp, "fc1_g")
        biased = block.attn.q_bias is not None
        made = transformers.DINOv3ViTConfig(
            hidden_size=encoder.width,
            intermediate_size=block.mlp.fc2.in_features,
            num_hidden_layers=len(encoder.vit.blocks),
            num_attention_heads=block.attn.num_heads,
            patch_size=encoder.patch_size,
            image_size=encoder.image_size,
            num_channels=encoder.channels,
            num_register_tokens=encoder.vit.num_prefix_tokens - 1,
            use_gated_mlp=gated,
            hidden_act="silu" if gated else "gelu",
            query_bias=biased,
            value_bias=biased,
            layerscale_value=block.init_values,
            drop_path_rate=drop_path,
            pos_embed_shift=config.rope_shift or None,
            pos_embed_jitter=config.rope_jitter or None,
            pos_embed_rescale=config.rope_rescale or None,
            attn_implementation="eager",
        )
        model = transformers.DINOv3ViTModel(made)
        model.embeddings.mask_token.requires_grad_(False)  # nothing is masked
        return model


class _Cls(nn.Module):
    """[CLS] of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.model(images).last_hidden_state
        return tokens[:, 0]


PEERS: dict[str, type[Peer]] = {
    "original": OriginalDINO,
    "timm": TimmDINO,
    "huggingface": HuggingFaceDINO,
    "lightly": LightlyDINO,
    "lightly-grouped": LightlyGroupedDINO,
}
CHAINS: dict[str, type[OriginalChain]] = {"original": OriginalChain, "lightly": LightlyChain}
