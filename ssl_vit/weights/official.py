"""Weight import: encoders of ssl_vit, timm, the official releases and Hugging Face.

The format is recognised by the tensors' names, the architecture by their shapes, and all tensors
of the encoder are required.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ssl_vit.common.errors import UserError, check
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights import from_timm
from ssl_vit.weights.exchange import (
    ENCODER_FILE,
    EncoderInfo,
    encoder_of,
    is_encoder_file,
    is_ours,
    load_encoder,
    read_info,
)
from ssl_vit.weights.keymaps import HUGGING_FACE, TIMM, Mapped, to_timm
from ssl_vit.weights.reading import (
    Statistics,
    heads_of,
    hints_of,
    preprocessing,
    read_content,
    read_json,
    unwrapped,
)
from ssl_vit.weights.shapes import Hints, config_of

FILES = ("model.safetensors", "pytorch_model.bin")


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
    """Foreign file, mapped to an encoder; ``assumed``: statistics missing in the file."""

    info: EncoderInfo
    mapped: Mapped
    path: Path
    assumed: str

    def report(self) -> str:
        """Report of the tensors loaded and left out."""
        n = len(self.mapped.state)
        left = ", ".join(
            f"{group} {count}" for group, count in sorted(self.mapped.left_out.items())
        )
        parts = [f"{n} of {n} tensors", f"left out: {left}" if left else "", self.assumed]
        return "; ".join(part for part in parts if part)


def open_weights(name: str | Path) -> Opened:
    """Open the encoder that ``name`` denotes, with its weights, in evaluation mode.

    A run folder, a file of any format known here, a folder of Hugging Face's, ``timm:NAME:FILE``
    (a file of timm's with its architecture by name) or ``timm:NAME`` (weights timm downloads).

    Raises:
        UserError: no such file, damaged, not a Vision Transformer, or a tensor is missing,
            unexpected or of another shape.
    """
    file = _file(name)
    if file is not None and is_ours(file):
        encoder, info = load_encoder(file)
        n = len(encoder.vit.state_dict())
        left = "" if is_encoder_file(file) else "; left out: the classifier"
        return Opened(encoder, info, file, "ssl_vit", f"{n} of {n} tensors{left}")
    arch = _arch(name)
    found = _from_timm(arch, with_weights=True) if file is None else _foreign(file, arch)
    where = str(found.path)
    try:
        encoder = encoder_of(found.info, found.mapped.state, where)
    except UserError as error:
        unnamed = found.mapped.format == TIMM and not arch
        hint = f"; its architecture can be given: timm:NAME:{where}" if unnamed else ""
        raise UserError(f"{error}{hint}") from None
    return Opened(encoder, found.info, found.path, found.mapped.format, found.report())


def weights_info(name: str | Path) -> tuple[EncoderInfo, Path | None]:
    """Encoder info of what :func:`open_weights` would open, without its weights.

    For ``timm:NAME`` nothing is downloaded, and the path is None.

    Raises:
        UserError: no such file, damaged, or not a Vision Transformer.
    """
    file = _file(name)
    if file is None:
        return _from_timm(_arch(name), with_weights=False).info, None
    if is_ours(file):
        return read_info(file), file
    return _foreign(file, _arch(name), shapes_only=True).info, file


def _arch(name: str | Path) -> str:
    """NAME of ``timm:NAME`` and ``timm:NAME:FILE``; else empty."""
    text = str(name)
    return text.split(":")[1] if text.startswith("timm:") else ""


def _file(name: str | Path) -> Path | None:
    """Path of the weight file; None for ``timm:NAME``."""
    text = str(name)
    if text.startswith("timm:"):
        text = text.partition(":")[2].partition(":")[2]
        if not text:
            return None
    path = Path(text).expanduser()
    allowed = (ENCODER_FILE, *FILES)
    inside = [path / file for file in allowed if (path / file).is_file()]
    check(
        path.is_file() or bool(inside),
        f"--encoder is {str(name)!r}; no such file, nor a folder with {' or '.join(allowed)}",
    )
    return path if path.is_file() else inside[0]


def _foreign(path: Path, name: str, shapes_only: bool = False) -> _Found:
    """Read a file of another library, with its accompanying configuration files."""
    wrapper, state = unwrapped(read_content(path), str(path))
    folder = path.parent if path.name in FILES else None
    config = read_json(folder / "config.json") if folder else {}
    if shapes_only:
        state = {k: v if _has_value(k) else v.to("meta") for k, v in state.items()}
    mapped = to_timm(wrapper, state, str(path), str(config.get("model_type") or ""))
    if mapped.format in HUGGING_FACE.values():
        statistics = preprocessing(folder)
        return _found(mapped, path, hints_of(config, mapped.format, path), statistics)
    name = name or (str(config.get("architecture") or "") if mapped.format == TIMM else "")
    known = None
    if name:
        known = from_timm.pixel_statistics(name)
    elif mapped.format != TIMM:
        known = (IMAGENET_MEAN, IMAGENET_STD)
    hints = Hints(from_timm.architecture(name) if name else "", heads_of(config, path))
    return _found(mapped, path, hints, known)


def _has_value(key: str) -> bool:
    """True if the values of a tensor, not only its shape, determine the architecture."""
    return key.endswith(("pos_embed", "position_embeddings", "cls_token"))


def _found(mapped: Mapped, path: Path, hints: Hints, known: Statistics | None) -> _Found:
    """Add the architecture and the image statistics, assumed if unknown."""
    config, channels = config_of(mapped.state, str(path), hints)
    config = replace(config, resampling=mapped.resampling(hints.arch))
    if known is not None and len(known[0]) == channels:
        return _Found(EncoderInfo(config, channels, *known, mapped.method), mapped, path, "")
    usual: Statistics = (IMAGENET_MEAN, IMAGENET_STD)
    if channels != 3 or mapped.format == HUGGING_FACE["vit"]:
        usual = ((0.5,) * channels, (0.5,) * channels)
    info = EncoderInfo(config, channels, *usual, mapped.method)
    return _Found(info, mapped, path, f"mean {usual[0]} and deviation {usual[1]} are assumed")


def _from_timm(name: str, with_weights: bool) -> _Found:
    """Weights of timm of that name, or only their shapes."""
    arch = from_timm.architecture(name)
    state, path = from_timm.shapes(name), Path()
    if with_weights:
        state, path = from_timm.downloaded(name)
    mapped = to_timm("", state, f"timm:{name}")
    return _found(mapped, path, Hints(arch), from_timm.pixel_statistics(name))
