"""Our encoder file: safetensors with timm's keys, and all that is needed to use it as metadata."""

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
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ssl_vit.common.config import EncoderConfig, UserError, check
from ssl_vit.common.files import write_atomically
from ssl_vit.model.encoder import Encoder, timm_kwargs, without_memory

ENCODER_FILE = "encoder.safetensors"
_KEY = "ssl_vit"
# What the names of a classifier's last layer begin with, in a file of a fine-tuned network.
HEAD = "head."


@dataclass(frozen=True)
class EncoderInfo:
    """What an encoder file says of itself: how images are prepared, and where it comes from."""

    config: EncoderConfig
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    method: str = ""
    step: int = 0


def save_encoder(path: Path, encoder: Encoder, info: EncoderInfo) -> None:
    """Write an encoder, whole or not at all; the same encoder gives the same bytes.

    The metadata have one key, ``ssl_vit``: JSON with ``info`` (an :class:`EncoderInfo`) and
    ``timm``, the ``arch`` and ``kwargs`` of the timm call that builds the same model.
    """
    encoder_writer(path, encoder, info)()


def encoder_writer(path: Path, encoder: Encoder, info: EncoderInfo) -> Callable[[], None]:
    """Copy an encoder's weights as they are now; what is returned writes them, as
    :func:`save_encoder` does, whenever it is called."""
    tensors = contiguous_state(encoder.vit)
    recipe: dict[str, Any] = {
        "arch": info.config.arch,
        "kwargs": timm_kwargs(info.config, info.channels),
    }
    if info.config.norm_eps:  # no argument of timm's: ssl_vit.model.encoder.set_norm_eps
        recipe["norm_eps"] = info.config.norm_eps
    content = {"timm": recipe, "info": dataclasses.asdict(info)}
    return lambda: write_own(path, tensors, content)


def write_own(path: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Write tensors with ``content`` as their metadata, whole or not at all."""
    # One key, because safetensors writes several in an order of chance.
    metadata = {_KEY: json.dumps(content)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def encoder_path(name: str | Path) -> Path:
    """The encoder file of a run folder, or the file itself.

    Raises:
        UserError: there is none.
    """
    path = Path(name).expanduser()
    file = path / ENCODER_FILE if path.is_dir() else path
    check(file.is_file(), f"--encoder is {str(name)!r}; no such file, nor a run folder with one")
    return file


def own_metadata(path: Path) -> dict[str, Any]:
    """What we wrote into a safetensors file beside its tensors; empty in a file of others.

    Raises:
        UserError: not a safetensors file, or its metadata are not ours under our name.
    """
    text = read_safetensors(path, tensors=False)[1].get(_KEY, "{}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    check(isinstance(content, dict), f"{path}: metadata of another version of ssl_vit: {text:.60}")
    return dict(content)


def is_ours(path: Path) -> bool:
    """Whether a file holds an encoder written here, alone or within a fine-tuned classifier."""
    try:
        return "info" in own_metadata(path)
    except UserError:
        return False


def is_encoder_file(path: Path) -> bool:
    """Whether a file was written by :func:`save_encoder`."""
    return is_ours(path) and "about" not in own_metadata(path)


def _first_bytes(path: Path) -> bytes:
    """The first four bytes of a file; none if it is no file."""
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(4)


def read_info(path: Path) -> EncoderInfo:
    """The metadata of an encoder file.

    Raises:
        UserError: not one of our encoder files.
    """
    metadata = own_metadata(path)
    check(bool(metadata), f"{path}: a safetensors file, but not an encoder written by ssl_vit")
    try:
        info = metadata["info"]
        config: dict[str, Any] = info.pop("config")
        config["image_size"] = tuple(config["image_size"])
        mean, std = tuple(info.pop("mean")), tuple(info.pop("std"))
        return EncoderInfo(config=EncoderConfig(**config), mean=mean, std=std, **info)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: metadata of another version of ssl_vit: {error}") from None


def load_encoder(name: str | Path) -> tuple[Encoder, EncoderInfo]:
    """The encoder in a run folder or file, in evaluation mode, with what its file says of it.

    Of a classifier that was fine-tuned here, what comes before its head.

    Raises:
        UserError: no such file, not ours, or its weights do not match its architecture.
    """
    path = encoder_path(name)
    info = read_info(path)
    state = read_safetensors(path)[0]
    state = {k: v for k, v in state.items() if not k.startswith(HEAD)}
    return encoder_of(info, state, str(path)), info


def encoder_of(info: EncoderInfo, state: dict[str, Tensor], where: str) -> Encoder:
    """The encoder that ``info`` describes with all of ``state``, in evaluation mode.

    Raises:
        UserError: names or shapes differ, as :func:`load_strictly` says.
    """
    _check_claims(info.config, state, where)
    # Without memory first: drawing random weights takes longer than reading the ones of a file.
    with without_memory():
        encoder = Encoder(info.config, info.channels)
    encoder.to_empty(device="cpu")
    load_strictly(encoder.vit, state, where)
    return encoder.eval()


def _check_claims(config: EncoderConfig, state: dict[str, Tensor], where: str) -> None:
    """Refuse an architecture far larger than the file before it is given memory."""
    blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    stem, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    widths = (0, *(stem.shape[:1] if stem is not None else ()))
    places = positions.shape[1] if positions is not None and positions.ndim == 3 else 0
    patch = stem.shape[-1] if stem is not None and stem.ndim == 4 else 1
    pixels = math.prod(config.image_size) if len(config.image_size) == 2 else 0
    pixels = config.image_size[0] ** 2 if len(config.image_size) == 1 else pixels
    fits = config.depth in (0, blocks) and config.width in widths
    # What is merely another size is told more exactly later on.
    fits = fits and pixels <= 100 * max(1, places) * patch**2
    check(fits, f"{where}: an architecture that is not the file's: {config}")


def resample_positions(
    state: dict[str, Tensor], source: Encoder, target: Encoder
) -> dict[str, Tensor]:
    """``state``, of ``source.vit``, with positions for the image size of ``target``.

    Those of the patches are resampled bicubically, those of [CLS] and registers kept; every other
    tensor is the same object.

    Raises:
        UserError: one of the two has positions for [CLS] or registers, the other has not.
    """
    position = state["pos_embed"]
    prefixes = [e.vit.pos_embed.shape[1] - math.prod(e.grid) for e in (source, target)]
    check(
        prefixes[0] == prefixes[1],
        f"positions of {prefixes[0]} prefix tokens do not fit an encoder with {prefixes[1]}",
    )
    if source.grid == target.grid:
        return state
    resampled = resample_abs_pos_embed(
        position,
        list(target.grid),
        old_size=list(source.grid),
        num_prefix_tokens=prefixes[0],
    )
    return {**state, "pos_embed": resampled}


def load_strictly(module: nn.Module, state: dict[str, Tensor], where: str) -> str:
    """Load all of ``state`` into all of ``module``, and say so: "n of n tensors".

    Raises:
        UserError: names or shapes differ; the first few are given.
    """
    own, given = module.state_dict(), {k: v.shape for k, v in state.items()}
    said = check_names_and_shapes({k: v.shape for k, v in own.items()}, given, where)
    module.load_state_dict(state, strict=True)
    return said


def check_names_and_shapes(
    own: Mapping[str, torch.Size], given: Mapping[str, torch.Size], where: str
) -> str:
    """Refuse tensors that are not all of a module's own, and only those: else "n of n tensors".

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


def read_safetensors(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file; nothing in it can execute.

    Raises:
        UserError: not a safetensors file (a pickle is named as one).
    """
    try:
        with safe_open(path, "pt") as file:
            found = {k: file.get_tensor(k) for k in file.keys()} if tensors else {}  # noqa: SIM118
            return found, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        start = _first_bytes(path)
        kind = (
            "a pickle"
            if start[:1] == b"\x80" or start[:2] == b"PK"
            else "damaged or another format"
        )
        raise UserError(f"{path}: not a safetensors file ({kind}): {error}") from None


def sha256(path: Path) -> str:
    """The identity of a file: the SHA-256 of its bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contiguous_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors ready for a file: on the CPU, contiguous, detached."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in module.state_dict().items()}


def random_like(info: EncoderInfo, seed: int) -> Encoder:
    """The same architecture with fresh random weights, a function of ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(info.config, info.channels).eval()
