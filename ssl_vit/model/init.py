"""Initial weights of an encoder and of what is trained on top of it, as two families draw them."""

from __future__ import annotations

from torch import nn

from ssl_vit.model.encoder import Encoder


def xavier_init(encoder: Encoder, *others: nn.Module) -> None:
    """MAE's: Xavier-uniform linear maps, the patch projection as one, zero biases, tokens normal
    with σ = .02 (He et al. 2022, appendix A.1)."""
    xavier_linears(encoder, *others)
    projection = encoder.vit.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    for token in (encoder.vit.cls_token, encoder.vit.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)


def xavier_linears(*networks: nn.Module) -> None:
    """Xavier-uniform linear maps, zero biases."""
    for module in (m for network in networks for m in network.modules()):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def truncated_init(encoder: Encoder, *others: nn.Module) -> None:
    """DINO's: linear maps, tokens and trained positions truncated normal with σ = .02, zero biases
    (Caron et al. 2021, after Touvron et al. 2021)."""
    truncated_linears(encoder, *others)
    vit = encoder.vit
    for token in (vit.cls_token, vit.reg_token):
        if token is not None:
            nn.init.trunc_normal_(token, std=0.02)
    if vit.pos_embed is not None and vit.pos_embed.requires_grad:
        nn.init.trunc_normal_(vit.pos_embed, std=0.02)


def truncated_linears(*networks: nn.Module) -> None:
    """Linear maps truncated normal with σ = .02, zero biases."""
    for module in (m for network in networks for m in network.modules()):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
