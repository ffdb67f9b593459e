"""MAE peers: the MAE training step of other implementations.

The original step is written from its description (He et al. 2022, sections 3 and 4, appendix A.1).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_vit.benchmarks.chains import OriginalChain
from ssl_vit.benchmarks.peers import Peer, check_plain, library, timm_vit
from ssl_vit.benchmarks.side import Workload
from ssl_vit.common.errors import check
from ssl_vit.model.encoder import take
from ssl_vit.model.init import xavier_linears
from ssl_vit.model.positions import sincos_positions


class OriginalMAE(Peer):
    """Original MAE step.

    A convolution embeds all patches, and the visible ones are gathered. The decoder gets all
    patches in order and predicts every one; the loss is masked. Attention is plain matrix products.
    """

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        encoder, method = check_plain(work, "original", square=False), work.method
        vit = timm_vit(work, drop_path_rate=work.encoder.drop_path)
        n, dim = encoder.grid[0] * encoder.grid[1], method.decoder_width
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        if work.encoder.positions == "sincos":
            vit.pos_embed.data[0, 1:] = sincos_positions(encoder.grid, encoder.width)
            vit.pos_embed.data[0, 0] = 0
            vit.pos_embed.requires_grad_(False)
        positions = torch.cat([torch.zeros(1, dim), sincos_positions(encoder.grid, dim)])
        self.patch, self.kept = encoder.patch_size, int(n * (1 - method.mask_ratio))
        parts = {
            "vit": vit,
            "embed": nn.Linear(encoder.width, dim),
            "blocks": nn.Sequential(
                *(
                    Block(dim, method.decoder_heads, qkv_bias=True, norm_layer=norm)
                    for _ in range(method.decoder_depth)
                )
            ),
            "norm": norm(dim),
            "predict": nn.Linear(dim, self.patch**2 * work.channels),
        }
        for block in [*vit.blocks, *parts["blocks"]]:
            block.attn.fused_attn = False
        xavier_linears(*parts.values())
        networks: Any = nn.ModuleDict(parts)
        networks.mask_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        networks.register_buffer("positions", positions[None], persistent=False)
        self.begin(networks)

    def vits(self) -> list[Any]:
        """The encoder."""
        return [self.networks.vit]

    def loss(self, views: list[Tensor]) -> Tensor:
        """MAE loss; each image is masked anew."""
        images, n = views[0], self.networks.positions.shape[1] - 1
        return self.masked_loss(images, torch.rand(len(images), n, device=images.device))

    def masked_loss(self, images: Tensor, noise: Float[Tensor, "b n"]) -> Float[Tensor, ""]:
        """MAE loss, averaged over masked patches; those of the smallest noise are visible."""
        net: Any = self.networks
        order = noise.argsort(1)
        restore = order.argsort(1)
        latent = self._encode(images, order[:, : self.kept])
        prediction = net.predict(self._decode(latent, restore))[:, 1:]
        p = self.patch
        target = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
        if self.work.method.normalize_target:
            mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6) ** 0.5
        mask = torch.ones_like(noise)
        mask[:, : self.kept] = 0
        mask = mask.gather(1, restore)
        error = (prediction - target).square().mean(-1)
        return (error * mask).sum() / mask.sum()

    def _encode(self, images: Tensor, keep: Tensor) -> Float[Tensor, "b m d"]:
        vit = self.networks.vit
        x = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        x = take(x, keep)
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        return vit.norm(vit.blocks(torch.cat([first, x], 1)))

    def _decode(self, latent: Tensor, restore: Tensor) -> Float[Tensor, "b m w"]:
        net: Any = self.networks
        x = net.embed(latent)
        masked = net.mask_token.repeat(len(x), restore.shape[1] + 1 - x.shape[1], 1)
        patches = take(torch.cat([x[:, 1:], masked], 1), restore)
        x = torch.cat([x[:, :1], patches], 1) + net.positions
        return net.norm(net.blocks(x))


class HuggingFaceMAE(Peer):
    """Hugging Face MAE step: ``ViTMAEForPreTraining`` of transformers, which returns the loss."""

    @staticmethod
    def load() -> None:
        """Import of transformers."""
        library("huggingface", "transformers", "models.vit_mae.modeling_vit_mae")

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        (transformers,) = library("huggingface", "transformers", "")
        encoder = check_plain(work, "huggingface")
        block, method = encoder.vit.blocks[0], work.method
        plain = isinstance(block.ls1, nn.Identity) and work.encoder.drop_path == 0
        check(plain, "--against huggingface does not support layer scale or stochastic depth")
        config = transformers.ViTMAEConfig(
            hidden_size=encoder.width,
            num_hidden_layers=len(encoder.vit.blocks),
            num_attention_heads=block.attn.num_heads,
            intermediate_size=block.mlp.fc1.out_features,
            layer_norm_eps=block.norm1.eps,
            image_size=encoder.image_size[0],
            patch_size=encoder.patch_size,
            num_channels=work.channels,
            mask_ratio=method.mask_ratio,
            norm_pix_loss=method.normalize_target,
            decoder_hidden_size=method.decoder_width,
            decoder_num_hidden_layers=method.decoder_depth,
            decoder_num_attention_heads=method.decoder_heads,
            decoder_intermediate_size=4 * method.decoder_width,
        )
        self.begin(transformers.ViTMAEForPreTraining(config))

    def loss(self, views: list[Tensor]) -> Tensor:
        """MAE loss; each image is masked anew."""
        loss: Tensor = self.networks(pixel_values=views[0]).loss
        return loss


class HuggingFaceMAEFloat32(HuggingFaceMAE):
    """Hugging Face MAE step without autocast, the library's default."""

    def __init__(self, work: Workload) -> None:
        super().__init__(replace(work, precision=torch.float32))


class LightlyMAE(Peer):
    """lightly MAE step: its modules as in its example of MAE; only masked patches are predicted."""

    @staticmethod
    def load() -> None:
        """Import of lightly."""
        warnings.filterwarnings("ignore", category=FutureWarning)
        library("lightly", "lightly", "models.modules", "models.utils")

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        modules, self.utils = library("lightly", "lightly", "models.modules", "models.utils")
        encoder, method = check_plain(work, "lightly"), work.method
        check(
            hasattr(modules, "MAEDecoderTIMM"),
            "--against lightly needs MAEDecoderTIMM, which lightly 1.7 has removed; install 1.6",
        )
        vit = timm_vit(work, drop_path_rate=work.encoder.drop_path)
        fixed = work.encoder.positions == "sincos"
        backbone = modules.MaskedVisionTransformerTIMM(
            vit, pos_embed_initialization="sincos" if fixed else "skip"
        )
        backbone.mask_token.requires_grad_(False)  # unused: the encoder gets visible patches only
        decoder = modules.MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=encoder.patch_size,
            in_chans=work.channels,
            embed_dim=encoder.width,
            decoder_embed_dim=method.decoder_width,
            decoder_depth=method.decoder_depth,
            decoder_num_heads=method.decoder_heads,
        )
        self.patch = encoder.patch_size
        self.begin(nn.ModuleDict({"backbone": backbone, "decoder": decoder}))

    def vits(self) -> list[Any]:
        """The encoder."""
        return [self.networks.backbone.vit]

    def loss(self, views: list[Tensor]) -> Tensor:
        """MAE loss; each image is masked anew."""
        images, length = views[0], self.networks.backbone.sequence_length
        keep, masked = self.utils.random_token_mask(
            size=(len(images), length),
            mask_ratio=self.work.method.mask_ratio,
            device=images.device,
        )
        return self.masked_loss(images, keep, masked)

    def masked_loss(self, images: Tensor, keep: Tensor, masked: Tensor) -> Float[Tensor, ""]:
        """MAE loss; ``keep`` and ``masked`` are positions in the sequence, [CLS] at 0."""
        utils, net = self.utils, self.networks
        length = net.backbone.sequence_length
        x = net.decoder.embed(net.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(net.decoder.mask_token, (len(images), length))
        tokens = utils.set_at_index(tokens, keep, x.type_as(tokens))
        decoded = utils.get_at_index(net.decoder.decode(tokens), masked)
        target = utils.get_at_index(utils.patchify(images, self.patch), masked - 1)
        if self.work.method.normalize_target:
            target = utils.normalize_mean_var(target, dim=-1)
        return nn.functional.mse_loss(net.decoder.predict(decoded), target)


PEERS: dict[str, type[Peer]] = {
    "original": OriginalMAE,
    "huggingface": HuggingFaceMAE,
    "huggingface-fp32": HuggingFaceMAEFloat32,
    "lightly": LightlyMAE,
}
CHAINS: dict[str, type[OriginalChain]] = {"original": OriginalChain}
