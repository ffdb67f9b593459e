"""MAE decoders in other libraries' files, mapped to our names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ssl_vit.common.errors import check
from ssl_vit.weights.keymaps import HUGGING_FACE, MAE, State, hugging_face_names
from ssl_vit.weights.reading import FILES, INDEX, read_content, read_json
from ssl_vit.weights.unwrapping import unwrapped

_OFFICIAL_HEADS = 16  # in every decoder of the release, whatever its width
_EMBED = "decoder_embed.weight"
# The original name, and the one that transformers 5 writes.
_HUGGING_FACE_BLOCKS = ("decoder_layers.", "decoder_encoder.layer.")
_OURS = (
    (r"^decoder_embed\.", "embed."),
    (r"^decoder_norm\.", "norm."),
    (r"^decoder_pred\.", "predict."),
    (r"^decoder_blocks\.", "blocks."),
)


@dataclass(frozen=True)
class DecoderWeights:
    """Decoder weights under the names of ``methods.mae.Decoder``, with their settings.

    ``positions`` (n, d) are those of the patches. ``normalized``: whether the target is pixels
    normalised by patch, None if unknown; ``known_from``: the source of that. ``mask_ratio``: share
    of masked patches, None if unknown. ``norm_eps``: of its LayerNorms.
    """

    where: Path
    format: str
    state: State
    positions: Float[Tensor, "n d"]
    heads: int
    normalized: bool | None
    mask_ratio: float | None
    known_from: str
    norm_eps: float = 1e-6

    @property
    def width(self) -> int:
        """Width: features of a decoder token."""
        return self.positions.shape[1]

    def __post_init__(self) -> None:
        check(self.depth > 0, f"{self.where}: the decoder has no blocks")

    @property
    def depth(self) -> int:
        """Depth: number of blocks."""
        return len({name.split(".")[1] for name in self.state if name.startswith("blocks.")})


def read_decoder(path: Path) -> DecoderWeights | None:
    """Read the decoder in a file of the official MAE, or of Hugging Face's ViTMAEForPreTraining.

    None if there is none. The official files do not contain the number of heads, which is 16 in all
    of them, nor always the training options.

    Raises:
        UserError: damaged, or an incomplete decoder.
    """
    content = unwrapped(read_content(path), str(path))
    state = content.state
    if _EMBED in state:
        return _official(state, content.options, path)
    if f"decoder.{_EMBED}" in state:
        return _hugging_face(state, path)
    return None


def _official(state: State, options: dict[str, Any], path: Path) -> DecoderWeights:
    own = {k: v for k, v in state.items() if k.startswith("decoder_") or k == "mask_token"}
    positions = _positions(own.pop("decoder_pos_embed", None), path)
    width = positions.shape[1]
    check(
        width % _OFFICIAL_HEADS == 0,
        f"{path}: a decoder of width {width}, which the {_OFFICIAL_HEADS} heads of the official "
        "MAE do not divide",
    )
    normalized, ratio = _options(options, "args", path)
    source = f"norm_pix_loss in the file's args is {normalized}" if normalized is not None else ""
    return DecoderWeights(
        path, MAE, _ours(own), positions, _OFFICIAL_HEADS, normalized, ratio, source
    )


def _hugging_face(state: State, path: Path) -> DecoderWeights:
    inner = {k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")}
    positions = _positions(inner.pop("decoder_pos_embed", None), path)
    blocks = {k: v for k, v in inner.items() if k.startswith(_HUGGING_FACE_BLOCKS)}
    others = {k: v for k, v in inner.items() if k not in blocks}
    # Their layers have the names of encoder layers.
    layers = {k.removeprefix("decoder_"): v for k, v in blocks.items()}
    own = _ours({**others, **hugging_face_names(layers, str(path))})
    in_folder = path.name.removesuffix(INDEX) in FILES
    where = path.parent / "config.json" if in_folder else path
    config = read_json(where) if in_folder else {}
    heads, eps = config.get("decoder_num_attention_heads", 16), config.get("layer_norm_eps", 1e-12)
    width = positions.shape[1]
    whole = type(heads) is int and heads > 0 and width % heads == 0
    check(
        whole and isinstance(eps, float) and eps > 0,
        f"{where}: a decoder of width {width} with {heads} heads and epsilon {eps}",
    )
    normalized, ratio = _options(config, "config.json", where)
    source = ""
    if config:  # transformers' own defaults where the file has no value
        normalized, ratio = normalized is True, 0.75 if ratio is None else ratio
        source = f"norm_pix_loss in config.json is {normalized}"
    kind = HUGGING_FACE["vit_mae"]
    return DecoderWeights(path, kind, own, positions, heads, normalized, ratio, source, eps)


def _ours(state: State) -> State:
    """Tensors under our names; unknown names are kept."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, ours in _OURS:
            name = re.sub(pattern, ours, name)
        renamed[name] = tensor
    return renamed


def _positions(given: Tensor | None, path: Path) -> Float[Tensor, "n d"]:
    """Positions of the patches; [CLS], which comes first, has none in any MAE."""
    shape = None if given is None else tuple(given.shape)
    check(
        given is not None and given.ndim == 3 and given.shape[0] == 1 and given.shape[1] > 1,
        f"{path}: decoder_pos_embed is {shape}; it must be (1, 1 + patches, width)",
    )
    assert given is not None
    check(
        not bool(given[0, 0].any()),
        f"{path}: decoder_pos_embed gives [CLS] a position; in an MAE's decoder that is zero",
    )
    return given[0, 1:].float()


def _options(options: dict[str, Any], kind: str, where: Path) -> tuple[bool | None, float | None]:
    """Options ``norm_pix_loss`` and ``mask_ratio`` of a file, where it has them."""
    normalized, ratio = options.get("norm_pix_loss"), options.get("mask_ratio")
    check(
        normalized in (None, True, False),
        f"{where}: norm_pix_loss in its {kind} is {normalized!r}; it must be true or false",
    )
    check(
        ratio is None or (isinstance(ratio, float) and 0 < ratio < 1),
        f"{where}: mask_ratio in its {kind} is {ratio!r}; it must lie between 0 and 1",
    )
    return (None if normalized is None else bool(normalized)), ratio
