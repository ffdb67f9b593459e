"""Key maps: other libraries' tensor names to timm's; the format is recognised by the keys.

Joined tensors are in the order timm expects: queries, keys, values; gate, value of a gated MLP.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from ssl_vit.common.errors import UserError, check
from ssl_vit.weights import dinov3
from ssl_vit.weights.lookalikes import looks_like
from ssl_vit.weights.renaming import joined, renamed, without
from ssl_vit.weights.unwrapping import STEMS, State, network

MAE, DINO, TIMM = "MAE (official)", "DINO (official)", "timm"
DINOV2, DINOV3 = "DINOv2 (official)", "DINOv3 (official)"
HUGGING_FACE = {
    "vit": "Hugging Face ViT",
    "vit_mae": "Hugging Face ViTMAE",
    "dinov2": "Hugging Face Dinov2",
    "dinov2_with_registers": "Hugging Face Dinov2WithRegisters",
    "dinov3_vit": "Hugging Face DINOv3ViT",
}
_METHODS = {MAE: "mae", DINO: "dino", DINOV2: "dinov2", HUGGING_FACE["vit_mae"]: "mae"}
_METHODS |= {HUGGING_FACE[kind]: "dinov2" for kind in ("dinov2", "dinov2_with_registers")}
_METHODS |= {DINOV3: "dinov3", HUGGING_FACE["dinov3_vit"]: "dinov3"}

# Tensors that do not belong to the encoder, by the name they are reported under.
_LEFT_OUT = {
    MAE: r"(decoder)_|(mask_token)$|(head)\.",
    DINO: r"(head)\.|(masked_embed)$",
    DINOV2: r"(mask_token)$|(head)\.",
    TIMM: r"(head)\.|(masked_embed)$",
    "Hugging Face": r"(decoder|pooler|classifier)\.|embeddings\.(mask_token)$",
}
_HEADS = {"head", "dino_head", "ibot_head"}  # beside the backbone, in files of DINO
_DINOV2_NAMES = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # in chunks; the second number is the block index
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^register_tokens$", "reg_token"),
)
_PATCHES = STEMS[1]
# Original names and those of transformers 5, which keeps the former on disk.
_HUGGING_FACE_JOINED = (
    ("attn.qkv", tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))),
    ("attn.qkv", tuple(f"attention.{part}_proj" for part in "qkv")),
    ("mlp.fc1", ("mlp.gate_proj", "mlp.up_proj")),
)
_HUGGING_FACE_NAMES = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^layernorm\.", "norm."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+\.)layernorm_before\.", r"\1norm1."),
    (r"^(blocks\.\d+\.)layernorm_after\.", r"\1norm2."),
    (r"^(blocks\.\d+\.)attention\.(?:output\.dense|o_proj)\.", r"\1attn.proj."),
    (r"^(blocks\.\d+\.)(?:intermediate\.dense|mlp\.weights_in)\.", r"\1mlp.fc1."),
    (r"^(blocks\.\d+\.)(?:output\.dense|mlp\.(?:weights_out|down_proj))\.", r"\1mlp.fc2."),
    (r"^(blocks\.\d+\.)layer_scale([12])\.lambda1$", r"\1ls\2.gamma"),
)


@dataclass(frozen=True)
class Mapped:
    """Mapped weights: an encoder under timm's names, its format, and counts of left-out tensors.

    ``notes``: which of several networks it is, and other notes. ``heads``,
    ``rope_periods``: of attention, where the file states them; 0 and empty where not.
    """

    format: str
    state: State
    left_out: Counter[str]
    notes: tuple[str, ...] = ()
    heads: int = 0
    rope_periods: tuple[float, ...] = ()

    @property
    def method(self) -> str:
        """Pretraining method of the format; empty if unknown."""
        return _METHODS.get(self.format, "")

    def resampling(self, arch: str) -> Literal["mixed", "timm", "mae", "dino"]:
        """Resampling of positions in the code that trained the network (``EncoderConfig``).

        DINOv2's own is that of its weights in any library's file: neither timm nor Hugging Face
        resamples as the official code does where there are no registers.

        Args:
            arch: timm's name of the architecture, where it was given.
        """
        if "pos_embed" not in self.state:
            return "mixed"  # rotary: there is nothing to resample
        if self.method == "dinov2" or "dinov2" in arch:
            return "timm" if "reg_token" in self.state else "dino"
        if self.format == DINO:
            return "dino"
        return "timm" if self.format == TIMM else "mae"


def to_timm(wrapper: str, state: State, where: str, model_type: str = "") -> Mapped:
    """Map a file's tensors to timm's names; unknown names are kept.

    A DINO backbone without heads has exactly timm's names, and is reported as timm. ``model_type``:
    of a Hugging Face configuration, where there is one.

    Raises:
        UserError: not a Vision Transformer, or its tensors cannot be joined.
    """
    own, others, chosen = network(state, where)
    if dinov3.is_official(own) or dinov3.is_hugging_face(own):
        found = _from_dinov3(own, where)
    elif any(k.endswith(_PATCHES) for k in own):
        has_decoder = any(k.endswith("decoder.decoder_embed.weight") for k in state)
        found = _from_hugging_face(own, has_decoder, where, model_type)
    else:
        has_heads = wrapper != "state_dict" and bool(_HEADS & others.keys())
        if not dinov3.is_timm(own):
            _check_plain(own, state, where)
        found = _from_official(wrapper, own, has_heads, where)
    return replace(found, left_out=others + found.left_out, notes=(chosen, *found.notes))


def _from_dinov3(state: State, where: str) -> Mapped:
    """Map an official DINOv3, or Hugging Face's."""
    if dinov3.is_hugging_face(state):
        own, left_out = dinov3.from_hugging_face(state, where)
        own, note = dinov3.without_zero_biases(own)
        return Mapped(HUGGING_FACE["dinov3_vit"], own, left_out, (note,))
    periods, said = dinov3.rope_periods(state, where)
    own, left_out = dinov3.from_official(state, where)
    own, note = dinov3.without_zero_biases(own)
    heads = dinov3.heads_by_periods(state)
    return Mapped(DINOV3, own, left_out, (note, said), heads, periods)


def _check_plain(state: State, whole: State, where: str) -> None:
    """Check that tensors are a plain Vision Transformer's; ``whole``: all of the file.

    Raises:
        UserError: they are not; the line says what they look like.
    """
    # Of a SAM, an EVA and an adapter, which have a plain one's tensors, too.
    strange = [k for k in state if k.endswith(("rel_pos_h", ".q_bias")) or ".lora_" in k]
    plain = "patch_embed.proj.weight" in state and "pos_embed" in state and not strange
    if plain:
        return
    looks = looks_like(whole)
    raise UserError(
        f"{where}: not a known Vision Transformer{f'; it looks like {looks}' if looks else ''}: no "
        f"patch_embed.proj.weight and pos_embed alone among {len(whole)} tensors "
        f"({', '.join(list(whole)[:3])}, ...)"
    )


def _from_official(wrapper: str, state: State, has_heads: bool, where: str) -> Mapped:
    """Map a network with timm's names or nearly so."""
    kind = _kind(wrapper, state, has_heads)
    state, left_out = without(state, _LEFT_OUT[kind])
    if kind == DINOV2:
        state = with_own_position(renamed(state, _DINOV2_NAMES, where))
    return Mapped(kind, state, left_out)


def _kind(wrapper: str, state: State, has_heads: bool) -> str:
    """Format of a file with timm's names or nearly so."""
    if "pos_embed" not in state:
        return TIMM
    mask = state.get("mask_token")
    gated = any(re.match(r"blocks\.(\d+\.)+mlp\.w12\.", k) for k in state)
    chunked = any(re.match(r"blocks\.\d+\.\d+\.", k) for k in state)
    if "register_tokens" in state or gated or chunked or (mask is not None and mask.ndim == 2):
        return DINOV2
    if has_heads or wrapper == "teacher":
        return DINO
    fixed = wrapper == "model" and ("fc_norm.weight" in state or cls_has_no_position(state))
    has_decoder = any(k.startswith("decoder_") for k in state)
    return MAE if has_decoder or mask is not None or fixed else TIMM


def cls_has_no_position(state: State) -> bool:
    """True if the first position is zero, as in MAE's fixed sine-cosine positions for [CLS]."""
    position = state["pos_embed"]
    return position.ndim == 3 and position.numel() > 0 and not bool(position[0, 0].any())


def with_own_position(state: State) -> State:
    """Add the position of [CLS] to the token itself where there are registers.

    timm gives prefix tokens no position where there are registers (``no_embed_class``).
    """
    if "reg_token" not in state or "cls_token" not in state:
        return state
    position, cls = state["pos_embed"], state["cls_token"]
    if position.ndim != 3 or cls.ndim != 3 or position.shape[2] != cls.shape[2]:
        return state
    return {**state, "cls_token": cls + position[:, :1], "pos_embed": position[:, 1:]}


def _from_hugging_face(state: State, has_decoder: bool, where: str, model_type: str) -> Mapped:
    """Map Hugging Face's ViT, ViTMAE, Dinov2 or Dinov2WithRegisters, without its prefix."""
    known = ", ".join(HUGGING_FACE)
    message = f"{where}: a Hugging Face model of type {model_type!r}; known here: {known}"
    check(model_type in ("", *HUGGING_FACE), message)
    state, left_out = without(state, _LEFT_OUT["Hugging Face"])
    state = hugging_face_names(state, where)
    check("pos_embed" in state, f"{where}: missing embeddings.position_embeddings")
    if not model_type and any(k.endswith(".ls1.gamma") for k in state):
        model_type = "dinov2_with_registers" if "reg_token" in state else "dinov2"
    elif not model_type:
        model_type = "vit_mae" if has_decoder or cls_has_no_position(state) else "vit"
    return Mapped(HUGGING_FACE[model_type], with_own_position(state), left_out)


def hugging_face_names(state: State, where: str) -> State:
    """Map Hugging Face's tensor names of a ViT, without a prefix, to timm's.

    Raises:
        UserError: tensors to be joined are missing, or their shapes differ.
    """
    return renamed(joined(state, _HUGGING_FACE_JOINED, where), _HUGGING_FACE_NAMES, where)
