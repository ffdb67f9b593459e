"""Encoder file: safetensors with timm's keys, and everything needed to use it as metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_vit.common.config import EncoderConfig, from_json
from ssl_vit.common.errors import UserError, check
from ssl_vit.common.files import write_atomically
from ssl_vit.model.architecture import take_memory, timm_kwargs, without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.positions import resampled
from ssl_vit.weights.own_files import ENCODER_FILE, KEY, not_safetensors, own_metadata

# Name prefix of a classifier's last layer, in a file of a fine-tuned network.
HEAD = "head."


@dataclass(frozen=True)
class EncoderInfo:
    """Encoder info: metadata of an encoder file, with architecture, image statistics and origin."""

    config: EncoderConfig
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    method: str = ""
    step: int = 0


def save_encoder(path: Path, encoder: Encoder, info: EncoderInfo) -> None:
    """Write an encoder atomically; the same encoder gives the same bytes.

    The metadata have one key, ``ssl_vit``: JSON with ``info`` (an :class:`EncoderInfo`) and
    ``timm``, the ``arch`` and ``kwargs`` of the timm call that builds the same model.
    """
    encoder_writer(path, encoder, info)()


def encoder_writer(path: Path, encoder: Encoder, info: EncoderInfo) -> Callable[[], None]:
    """Copy an encoder's weights; returns a function that writes them as :func:`save_encoder`."""
    tensors = contiguous_state(encoder.vit)
    recipe: dict[str, Any] = {
        "arch": info.config.arch,
        "kwargs": timm_kwargs(info.config, info.channels),
    }
    if info.config.norm_eps:  # not an argument of timm: ssl_vit.model.architecture.set_norm_eps
        recipe["norm_eps"] = info.config.norm_eps
    if info.config.stem != "patch":  # nor is this: ssl_vit.model.architecture.stem_option
        recipe["stem"] = info.config.stem
    content = {"timm": recipe, "info": dataclasses.asdict(info)}
    return lambda: write_own(path, tensors, content)


def write_own(path: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Write tensors with ``content`` as their metadata, atomically."""
    # One key, because safetensors writes several in random order.
    metadata = {KEY: json.dumps(content)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def encoder_path(name: str | Path) -> Path:
    """Path of the encoder file of a run folder, or the file itself.

    Raises:
        UserError: there is none.
    """
    path = Path(name).expanduser()
    file = path / ENCODER_FILE if path.is_dir() else path
    check(file.is_file(), f"--encoder is {str(name)!r}; no such file, nor a run folder with one")
    return file


def is_ours(path: Path) -> bool:
    """True if a file contains an encoder of ssl_vit, alone or in a fine-tuned classifier."""
    try:
        return "info" in own_metadata(path)
    except UserError:
        return False


def is_encoder_file(path: Path) -> bool:
    """True if a file was written by :func:`save_encoder`."""
    return is_ours(path) and "about" not in own_metadata(path)


def read_info(path: Path) -> EncoderInfo:
    """Read the metadata of an encoder file.

    Raises:
        UserError: not one of our encoder files.
    """
    metadata = own_metadata(path)
    check(bool(metadata), f"{path}: a safetensors file, but not an encoder written by ssl_vit")
    return info_of(metadata, "info", str(path))


def info_of(metadata: dict[str, Any], key: str, where: str) -> EncoderInfo:
    """Encoder info in metadata, under ``key``.

    Raises:
        UserError: it is none of this version.
    """
    try:
        info = dict(metadata[key])
        mean, std, config = tuple(info.pop("mean")), tuple(info.pop("std")), info.pop("config")
        return EncoderInfo(from_json(EncoderConfig, config), mean=mean, std=std, **info)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: metadata of another version of ssl_vit: {error}") from None


def load_encoder(name: str | Path) -> tuple[Encoder, EncoderInfo]:
    """Load the encoder in a run folder or file, in evaluation mode, with its metadata.

    Of a fine-tuned classifier, the network without its head.

    Raises:
        UserError: no such file, not ours, or its weights do not match its architecture.
    """
    path = encoder_path(name)
    info = read_info(path)
    state = read_safetensors(path)[0]
    state = {k: v for k, v in state.items() if not k.startswith(HEAD)}
    return encoder_of(info, state, str(path)), info


def encoder_of(info: EncoderInfo, state: dict[str, Tensor], where: str) -> Encoder:
    """Build the encoder that ``info`` describes, with all of ``state``, in evaluation mode.

    Raises:
        UserError: names or shapes differ (:func:`load_strictly`), or values are no numbers.
    """
    _check_claims(info.config, state, where)
    # On the meta device first: random initialization takes longer than reading a file.
    with without_memory():
        encoder = Encoder(info.config, info.channels)
    take_memory(encoder)
    load_strictly(encoder.vit, state, where)
    strange = [k for k, v in encoder.vit.state_dict().items() if not v.isfinite().all()]
    check(
        not strange,
        f"{where}: {len(strange)} of {len(state)} tensors have values that are infinite or no "
        f"numbers (NaN): {', '.join(strange[:3])}",
    )
    return encoder.eval()


def _check_claims(config: EncoderConfig, state: dict[str, Tensor], where: str) -> None:
    """Refuse an architecture far larger than the file, before memory is allocated for it."""
    blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    stem, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    widths = (0, *(stem.shape[:1] if stem is not None else ()))
    # Rotary positions have no table, and take any number of patches: here that of 4096 pixels.
    places = 700 if positions is None else positions.shape[1] if positions.ndim == 3 else 0
    halvings = sum(
        key.startswith("patch_embed.backbone.") and key.endswith(".conv.weight") for key in state
    )
    patch = 2**halvings * (stem.shape[-1] if stem is not None and stem.ndim == 4 else 1)
    pixels = math.prod(config.image_size) if len(config.image_size) == 2 else 0
    pixels = config.image_size[0] ** 2 if len(config.image_size) == 1 else pixels
    fits = config.depth in (0, blocks) and config.width in widths
    # Mere size mismatches get a more precise message later on.
    fits = fits and pixels <= 100 * max(1, places) * patch**2
    check(fits, f"{where}: its architecture does not match its tensors: {config}")


def resample_positions(
    state: dict[str, Tensor], source: Encoder, target: Encoder
) -> dict[str, Tensor]:
    """Resample positions: ``state``, of ``source.vit``, for the image size of ``target``.

    Positions of patches are resampled as ``source.config.resampling`` says (``mixed``: as timm
    does), those of [CLS] and registers kept; every other tensor is the same object.

    Raises:
        UserError: only one of the two has positions for [CLS] or registers.
    """
    if source.rotary or target.rotary:
        return state
    position = state["pos_embed"]
    prefixes = [e.vit.pos_embed.shape[1] - math.prod(e.grid) for e in (source, target)]
    prefix = prefixes[0]
    check(
        prefix == prefixes[1],
        f"positions of {prefix} prefix tokens do not fit an encoder with {prefixes[1]}",
    )
    if source.grid == target.grid:
        return state
    kind = "timm" if source.config.resampling == "mixed" else source.config.resampling
    patches = resampled(position[:, prefix:], source.grid, target.grid, kind)
    return {**state, "pos_embed": torch.cat([position[:, :prefix], patches], dim=1)}


def load_strictly(module: nn.Module, state: dict[str, Tensor], where: str) -> str:
    """Load all of ``state`` into all of ``module``; returns "n of n tensors".

    Raises:
        UserError: names or shapes differ; the first few are given.
    """
    own, given = module.state_dict(), {k: v.shape for k, v in state.items()}
    loaded = check_names_and_shapes({k: v.shape for k, v in own.items()}, given, where)
    module.load_state_dict(state, strict=True)
    return loaded


def check_names_and_shapes(
    own: Mapping[str, torch.Size], given: Mapping[str, torch.Size], where: str
) -> str:
    """Check that names and shapes match a module's exactly; returns "n of n tensors".

    Raises:
        UserError: names or shapes differ; the first few are given, with ``where``.
    """
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = [
        f"{k} is {tuple(given[k])} for {tuple(own[k])}"
        for k in sorted(own.keys() & given.keys())
        if own[k] != given[k]
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    problems = [f"{len(v)} {kind} ({', '.join(v[:3])})" for kind, v in parts if v]
    fitting = len(own) - len(missing) - len(shapes)
    check(not problems, f"{where}: {fitting} of {len(own)} tensors match: {'; '.join(problems)}")
    return f"{len(own)} of {len(own)} tensors"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata of a safetensors file; nothing in it can execute.

    Raises:
        UserError: not a safetensors file (a pickle is reported as such).
    """
    try:
        with safe_open(path, "pt") as file:
            found = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            return found, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise not_safetensors(path, error) from None


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contiguous_state(module: nn.Module) -> dict[str, Tensor]:
    """State dict for a file: copied to the CPU, contiguous, detached."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in module.state_dict().items()}


def random_like(info: EncoderInfo, seed: int) -> Encoder:
    """Encoder of the same architecture with random weights, a function of ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(info.config, info.channels).eval()
