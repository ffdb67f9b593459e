"""Weight import: encoders of ssl_vit, timm, the official releases and Hugging Face.

The format is recognised by the tensors' names, the architecture by their shapes, and all tensors
of the encoder are required.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssl_vit.common.errors import UserError, check
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights import dinov3, from_timm
from ssl_vit.weights.exchange import (
    EncoderInfo,
    encoder_of,
    is_encoder_file,
    is_ours,
    load_encoder,
    read_info,
)
from ssl_vit.weights.grids import Hints
from ssl_vit.weights.keymaps import (
    DINO,
    DINOV2,
    DINOV3,
    HUGGING_FACE,
    TIMM,
    Mapped,
    to_timm,
)
from ssl_vit.weights.own_files import ENCODER_FILE
from ssl_vit.weights.reading import (
    FILES,
    INDEX,
    Statistics,
    heads_of,
    hints_of,
    preprocessing,
    read_content,
    read_json,
    stated_size,
)
from ssl_vit.weights.rotary_shapes import infer_rotary
from ssl_vit.weights.shapes import infer
from ssl_vit.weights.unwrapping import Unwrapped, unwrapped

# In the names of DINOv3's files of satellite images, which have other statistics.
_SATELLITE = "sat493m"


@dataclass(frozen=True)
class Opened:
    """Opened weights: an encoder in evaluation mode, with its origin.

    ``format`` is "ssl_vit" for ours; ``report``: "n of n tensors", the tensors of the file that
    were left out on purpose, and any assumptions.
    """

    encoder: Encoder
    info: EncoderInfo
    path: Path
    format: str
    report: str


@dataclass(frozen=True)
class _Found:
    """Foreign file, mapped to an encoder; ``notes``: what was chosen, and what is assumed."""

    info: EncoderInfo
    mapped: Mapped
    path: Path
    notes: tuple[str, ...]

    def report(self) -> str:
        """Report of the tensors loaded and left out."""
        n = len(self.mapped.state)
        left = ", ".join(
            f"{group} {count}" for group, count in sorted(self.mapped.left_out.items())
        )
        parts = [f"{n} of {n} tensors", f"left out: {left}" if left else "", *self.notes]
        return "; ".join(part for part in parts if part)


def open_weights(name: str | Path, size: tuple[int, ...] = (), option: str = "--encoder") -> Opened:
    """Open the encoder that ``name`` denotes, with its weights, in evaluation mode.

    A run folder, a file of any format known here, a folder of Hugging Face's, ``timm:NAME:FILE``
    (a file of timm's with its architecture by name) or ``timm:NAME`` (weights timm downloads).

    Args:
        size: height and width in pixels, or one number, of the images it was trained on, if that
            is known; needed where the file does not say, and its positions are no square grid.
        option: what names it, if there is no such file.

    Raises:
        UserError: no such file, damaged, not a Vision Transformer, or a tensor is missing,
            unexpected or of another shape.
    """
    file = _file(name, option)
    if file is not None and is_ours(file):
        encoder, info = load_encoder(file)
        n = len(encoder.vit.state_dict())
        left = "" if is_encoder_file(file) else "; left out: the classifier"
        return Opened(encoder, info, file, "ssl_vit", f"{n} of {n} tensors{left}")
    arch = _arch(name)
    found = _from_timm(arch, with_weights=True) if file is None else _foreign(file, arch, size)
    where = str(found.path)
    try:
        encoder = encoder_of(found.info, found.mapped.state, where)
    except UserError as error:
        unnamed = found.mapped.format == TIMM and not arch
        hint = f"; its architecture can be given: timm:NAME:{where}" if unnamed else ""
        raise UserError(f"{error}{hint}") from None
    return Opened(encoder, found.info, found.path, found.mapped.format, found.report())


def weights_info(
    name: str | Path, size: tuple[int, ...] = (), option: str = "--encoder"
) -> tuple[EncoderInfo, Path | None]:
    """Encoder info of what :func:`open_weights` would open, without its weights; ``option`` names
    it, if there is no such file.

    For ``timm:NAME`` nothing is downloaded, and the path is None.

    Raises:
        UserError: no such file, damaged, or not a Vision Transformer.
    """
    file = _file(name, option)
    if file is None:
        return _from_timm(_arch(name), with_weights=False).info, None
    if is_ours(file):
        return read_info(file), file
    return _foreign(file, _arch(name), size, shapes_only=True).info, file


def _arch(name: str | Path) -> str:
    """NAME of ``timm:NAME`` and ``timm:NAME:FILE``; else empty."""
    text = str(name)
    return text.split(":")[1] if text.startswith("timm:") else ""


def _file(name: str | Path, option: str = "--encoder") -> Path | None:
    """Path of the weight file; None for ``timm:NAME``."""
    text = str(name)
    if text.startswith("timm:"):
        text = text.partition(":")[2].partition(":")[2]
        if not text:
            return None
    path = Path(text).expanduser()
    allowed = (ENCODER_FILE, *FILES, *(f"{file}{INDEX}" for file in FILES))
    inside = [path / file for file in allowed if (path / file).is_file()]
    check(
        path.is_file() or bool(inside),
        f"{option} is {str(name)!r}; no such file, nor a folder with {' or '.join(allowed)}",
    )
    return path if path.is_file() else inside[0]


def _foreign(path: Path, name: str, size: tuple[int, ...], shapes_only: bool = False) -> _Found:
    """Read a file of another library, with its accompanying configuration files."""
    content = unwrapped(read_content(path), str(path))
    folder = path.parent if path.name.removesuffix(INDEX) in FILES else None
    config = read_json(folder / "config.json") if folder else {}
    state = content.state
    if shapes_only:
        state = {k: v if _has_value(k) else v.to("meta") for k, v in state.items()}
    model_type = str(config.get("model_type") or "")
    mapped = to_timm(content.wrapper, state, str(path), model_type)
    name = name or (_timm_name(config, content) if mapped.format == TIMM else "")
    hints = replace(_hints(mapped, config, content, path), given_size=size)
    if mapped.format not in HUGGING_FACE.values():
        hints = replace(hints, arch=from_timm.architecture(name) if name else "")
    known = _statistics(mapped, name, path, folder)
    found = _found(mapped, path, hints, known)
    return replace(found, notes=(content.chosen, *mapped.notes, *found.notes))


def _hints(mapped: Mapped, config: dict[str, Any], content: Unwrapped, path: Path) -> Hints:
    """Architecture hints in a file and in the configuration beside it."""
    if mapped.format == HUGGING_FACE["dinov3_vit"]:
        return dinov3.hints_of(config, "blocks.0.mlp.fc1_g.weight" in mapped.state, path)
    if mapped.format in HUGGING_FACE.values():
        return hints_of(config, mapped.format, path)
    return Hints(
        heads=heads_of(config, path) or mapped.heads,
        stated_size=stated_size(content.options),
        square=mapped.format in (DINO, DINOV2),  # their code takes the square root
        rope_periods=mapped.rope_periods,
    )


def _statistics(mapped: Mapped, name: str, path: Path, folder: Path | None) -> Statistics | None:
    """Pixel statistics of the images a file was trained on; None if unknown."""
    if mapped.format in HUGGING_FACE.values():
        return preprocessing(folder)
    if mapped.format == DINOV3 and _SATELLITE in path.name:
        name = f"vit_large_patch16_dinov3.{_SATELLITE}"
    if name:
        return from_timm.pixel_statistics(name)
    return None if mapped.format == TIMM else (IMAGENET_MEAN, IMAGENET_STD)


def _timm_name(config: dict[str, Any], content: Unwrapped) -> str:
    """Name of timm's architecture in the configuration beside a file, or in one of its training."""
    named = str(config.get("architecture") or "")
    return named or (content.arch if from_timm.is_plain(content.arch) else "")


def _has_value(key: str) -> bool:
    """True if the values of a tensor, not only its shape, determine the architecture."""
    tables = "pos_embed", "position_embeddings", "cls_token", "rope_embed.periods"
    biases = "qkv.bias", "qkv.bias_mask", "q_proj.bias", "k_proj.bias", "v_proj.bias"
    return key.endswith(tables + biases)


def _found(mapped: Mapped, path: Path, hints: Hints, known: Statistics | None) -> _Found:
    """Add the architecture and the image statistics, assumed if unknown."""
    architecture = infer if "pos_embed" in mapped.state else infer_rotary
    inferred = architecture(mapped.state, str(path), hints)
    config = replace(inferred.config, resampling=mapped.resampling(hints.arch))
    channels, assumed = inferred.channels, ""
    if known is None or len(known[0]) != channels:
        known = (IMAGENET_MEAN, IMAGENET_STD)
        if channels != 3 or mapped.format == HUGGING_FACE["vit"]:
            known = ((0.5,) * channels, (0.5,) * channels)
        assumed = f"mean {known[0]} and deviation {known[1]} are assumed"
    info = EncoderInfo(config, channels, *known, mapped.method)
    return _Found(info, mapped, path, (inferred.note, assumed))


def _from_timm(name: str, with_weights: bool) -> _Found:
    """Weights of timm of that name, or only their shapes."""
    arch = from_timm.architecture(name)
    state, path = from_timm.shapes(name), Path()
    if with_weights:
        state, path = from_timm.downloaded(name)
    mapped = to_timm("", state, f"timm:{name}")
    return _found(mapped, path, Hints(arch), from_timm.pixel_statistics(name))
