"""DINOv3 in the names of its official files and of Hugging Face's, mapped to those of timm's Eva.

Keys have no bias: official files have one that is masked, the mask being anything (NaN, too) in
files that were never trained. Queries and values have one, which is zero in some released files;
timm has architectures with (``_qkvb``) and without.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.weights.grids import Hints
from ssl_vit.weights.renaming import joined, renamed, without
from ssl_vit.weights.unwrapping import STEMS, State

# bfloat16 keeps 8 bits, and so rounds by at most one part in 512.
_ROUNDING = 2**-8
_OFFICIAL_LEFT_OUT = (
    r"(mask_token)$|(local_cls_norm|rope_embed|projectors|head)\.|"
    r"blocks\.\d+\.attn\.qkv\.(bias_mask)$"
)
_OFFICIAL_NAMES = (
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_HUGGING_FACE_LEFT_OUT = r"embeddings\.(mask_token)$|(classifier|rope_embeddings)\."
_HUGGING_FACE_NAMES = (
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^(?:model\.)?layer\.(\d+)\.", r"blocks.\1."),  # in memory, and in files
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.([qv])_proj\.bias$", r".attn.\1_bias"),
    (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
_WITH_GATE = ((r"\.mlp\.gate_proj\.", ".mlp.fc1_g."), (r"\.mlp\.up_proj\.", ".mlp.fc1_x."))
_WITHOUT_GATE = ((r"\.mlp\.up_proj\.", ".mlp.fc1."),)


def is_official(state: State) -> bool:
    """True for the names of an official file."""
    return "rope_embed.periods" in state or "storage_tokens" in state


def is_hugging_face(state: State) -> bool:
    """True for the names of a Hugging Face file."""
    return STEMS[2] in state


def is_timm(state: State) -> bool:
    """True for the names of timm's DINOv3: an Eva with [CLS], registers, no added positions.

    Its other networks with rotary positions, of other kinds, lack one of these.
    """
    other = "pos_embed" in state or any("relative_position" in k for k in state)
    return not other and {"cls_token", "reg_token", "blocks.0.gamma_1"} <= state.keys()


def from_official(state: State, where: str) -> tuple[State, Counter[str]]:
    """Map an official file's backbone to timm's names; counts of tensors left out by their part.

    Raises:
        UserError: keys have a bias, for which timm's network has no place, or a bias is not one of
            queries, keys and values.
    """
    state = dict(state)
    for name in [k for k in state if k.endswith("attn.qkv.bias")]:
        mask = state.get(f"{name}_mask")
        bias = state.pop(name)
        for part, found in ((name, bias), (f"{name}_mask", bias if mask is None else mask)):
            shape = tuple(found.shape)
            fits = len(shape) == 1 and shape == bias.shape and shape[0] > 0 == shape[0] % 3
            check(fits, f"{where}: {part} is {shape}; expected (3 x width,)")
        mask = torch.ones_like(bias) if mask is None else mask.to(bias.dtype)
        queries, keys, values = bias.chunk(3)
        of_queries, of_keys, of_values = mask.chunk(3)
        if mask.isnan().any():
            of_queries = of_values = torch.ones_like(queries)
            of_keys = torch.zeros_like(queries)
        # What is masked may be NaN, which no product with 0 removes.
        check(not keys[of_keys != 0].any(), _no_place(where, name))
        state[name.replace("qkv.bias", "q_bias")] = queries * of_queries
        state[name.replace("qkv.bias", "v_bias")] = values * of_values
    kept, left_out = without(state, _OFFICIAL_LEFT_OUT)
    return renamed(kept, _OFFICIAL_NAMES, where), left_out


def from_hugging_face(state: State, where: str) -> tuple[State, Counter[str]]:
    """Map a Hugging Face DINOv3ViT, without a prefix; counts of tensors left out by their part.

    Raises:
        UserError: tensors to be joined are missing, or keys have a bias.
    """
    kept, left_out = without(state, _HUGGING_FACE_LEFT_OUT)
    kept = {k: v for k, v in kept.items() if v.numel()}  # without registers they are none of them
    for name in [k for k in kept if k.endswith("k_proj.bias")]:
        check(not kept.pop(name).any(), _no_place(where, name))
    weights = {k: v for k, v in kept.items() if k.endswith("_proj.weight")}
    parts = tuple(f"attention.{part}_proj" for part in "qkv")
    weights = joined(weights, (("attn.qkv", parts),), where)
    others = {k: v for k, v in kept.items() if not k.endswith("_proj.weight")}
    gated = any(".mlp.gate_proj." in k for k in kept)
    rules = _HUGGING_FACE_NAMES + (_WITH_GATE if gated else _WITHOUT_GATE)
    return renamed({**others, **weights}, rules, where), left_out


def _no_place(where: str, name: str) -> str:
    """Reason why a file whose keys have a bias is refused."""
    return f"{where}: {name} is not zero for keys, for which timm's network has no place"


def without_zero_biases(state: State) -> tuple[State, str]:
    """State without the biases of queries and values if all are zero, and a note on it."""
    biases = [k for k in state if k.endswith((".attn.q_bias", ".attn.v_bias"))]
    if not biases or any(bool(state[k].any()) for k in biases):
        return state, ""
    kept = {k: v for k, v in state.items() if k not in biases}
    return kept, "the biases of queries and values are zero, and left out"


def rope_periods(found: State, where: str) -> tuple[tuple[float, ...], str]:
    """Periods of an official file as ``EncoderConfig.rope_periods``, and a note if not of base 100.

    Official files have them rounded to bfloat16. Ours, as timm's and Hugging Face's, are exact.

    Raises:
        UserError: no list of numbers, or one without a constant ratio.
    """
    given = found.get("rope_embed.periods")
    if given is None:
        return (), ""
    shape = tuple(given.shape)
    check(
        len(shape) == 1 and shape[0] > 0, f"{where}: rope_embed.periods is {shape}; expected (n,)"
    )
    periods = given.double()
    n, order = len(periods), torch.arange(len(periods), dtype=torch.float64)
    first, ratio = 0.0, 0.0
    if n > 1 and bool((periods > 0).all()):
        # The closest constant ratio, in logarithms: single periods are rounded.
        line = torch.stack([torch.ones(n, dtype=torch.float64), order], 1)
        first, ratio = torch.linalg.lstsq(line, periods.log()[:, None]).solution[:, 0].tolist()
    for base in (100.0, float(f"{math.exp(ratio * n):.3g}"), math.exp(ratio * n)):
        if _close(periods, base ** (order / n)):
            return (base,), "" if base == 100 else f"its rotary periods have the base {base:g}"
    shown = ", ".join(f"{period:g}" for period in periods[:4].tolist())
    check(
        _close(periods, torch.exp(first + ratio * order)),
        f"{where}: rope_embed.periods are {shown} ...; they must have a constant ratio, as of base "
        "100",
    )
    least, largest = math.exp(first), math.exp(first + ratio * (n - 1))
    return (least, largest), f"its rotary periods are {least:.4g} to {largest:.4g}"


def _close(found: Tensor, wanted: Tensor) -> bool:
    """True if these are the same but for rounding to bfloat16."""
    return bool(((found - wanted).abs() <= _ROUNDING * wanted).all())


def heads_by_periods(found: State) -> int:
    """Number of heads by an official file's periods, a fourth of a head's features; or 0."""
    periods, stem = found.get("rope_embed.periods"), found.get(STEMS[0])
    if periods is None or stem is None or not periods.numel() or not stem.ndim:
        return 0
    return stem.shape[0] // (4 * periods.numel())


def hints_of(config: dict[str, Any], gated: bool, where: Path) -> Hints:
    """Architecture hints of a Hugging Face configuration; an empty one gives the usual values.

    Raises:
        UserError: a value of the wrong type, or another activation.
    """
    file = where.parent / "config.json"
    eps, heads = config.get("layer_norm_eps", 1e-5), config.get("num_attention_heads", 0)
    theta, size = config.get("rope_theta", 100.0), config.get("image_size")
    sides = [size, size] if isinstance(size, int) else size
    whole = type(heads) is int and isinstance(eps, float) and eps > 0
    whole = whole and isinstance(theta, int | float) and theta > 0
    whole = whole and (sides is None or [type(side) for side in sides] == [int, int])
    about = f"heads {heads}, epsilon {eps}, rope_theta {theta}, image size {size}"
    check(whole, f"{file}: {about}")
    usual = "silu" if gated else "gelu"
    act = config.get("hidden_act", usual)
    check(act == usual, f"{file}: hidden_act is {act!r}; it must be {usual}")
    return Hints("", heads, eps, tuple(sides) if sides else None, rope_periods=(float(theta),))
