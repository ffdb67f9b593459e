"""Weight export: an encoder as another library's file, verified by that library's features."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.errors import RunFailed, UserError, check
from ssl_vit.common.files import share_as_usual, sync
from ssl_vit.data.normalize import Normalize
from ssl_vit.model.architecture import rotary_architectures, timm_kwargs
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import (
    EncoderInfo,
    is_encoder_file,
    load_encoder,
    read_info,
    save_encoder,
)
from ssl_vit.weights.to_huggingface import (
    huggingface_features,
    is_huggingface_export,
    write_huggingface,
)
from ssl_vit.weights.to_onnx import is_onnx_export, onnx_features, outputs, write_onnx

LIMIT = 1e-4
"""Largest difference of a feature accepted as rounding."""


@dataclass(frozen=True)
class Format:
    """Export format.

    ``name``: default name of its file, or of its folder, which has no suffix. ``needs``: modules
    and the optional extra that installs them. ``write(path, encoder, info, crop_ratio)``;
    ``features(path, images)``: named features as the other library computes them from the file;
    ``is_ours(path)``: whether a file is an earlier export; ``usage(path, info)``: Python code that
    opens it.
    """

    name: str
    needs: tuple[tuple[str, ...], str]
    write: Callable[[Path, Encoder, EncoderInfo, float], None]
    features: Callable[[Path, Tensor], dict[str, Tensor]]
    is_ours: Callable[[Path], bool]
    usage: Callable[[Path, EncoderInfo], str]


def _write_own(path: Path, encoder: Encoder, info: EncoderInfo, crop_ratio: float) -> None:
    """Write our own format, with timm's tensor names; it does not store the crop ratio."""
    save_encoder(path, encoder, info)


def _own_features(path: Path, images: Tensor) -> dict[str, Tensor]:
    return outputs(load_encoder(path)[0], images)


def _timm_call(info: EncoderInfo) -> dict[str, Any]:
    """Arguments of the timm call; an epsilon is passed as a layer, which is not JSON.

    Raises:
        UserError: timm has no arguments for its stem or its rotary positions.
    """
    check(
        info.config.stem == "patch",
        "--to timm: timm has no name for a convolutional stem; --to onnx keeps it",
    )
    periods, coords = info.config.rope_periods, info.config.rope_coords
    check(
        len(periods) == 1 and coords == "separate",
        f"--to timm: its rotary positions have one base, and coordinates for each side, not "
        f"{' to '.join(f'{p:g}' for p in periods)}, {coords}; --to onnx keeps them",
    )
    kwargs = timm_kwargs(info.config, info.channels)
    if info.config.norm_eps:
        kwargs["norm_layer"] = partial(nn.LayerNorm, eps=info.config.norm_eps)
    return kwargs


def _timm_features(path: Path, images: Tensor) -> dict[str, Tensor]:
    """Features by timm's own reader, which refuses missing or unexpected tensors."""
    info = read_info(path)
    vit: Any = timm.create_model(
        info.config.arch, checkpoint_path=str(path), num_classes=0, **_timm_call(info)
    )
    tokens = vit.eval().forward_features(images)
    found = {} if vit.cls_token is None else {"cls": tokens[:, 0]}
    found["patches"] = tokens[:, vit.num_prefix_tokens :]
    if info.config.norm == "pooled":
        found["pooled"] = vit.forward_head(tokens, pre_logits=True)
    return found


def _timm_usage(path: Path, info: EncoderInfo) -> str:
    kwargs = {"checkpoint_path": str(path), "num_classes": 0} | _timm_call(info)
    if info.config.arch in rotary_architectures():
        kwargs.setdefault("global_pool", "token")  # timm's default is the mean patch there
    shown = {k: repr(v) for k, v in kwargs.items()}
    if "norm_layer" in kwargs:
        shown["norm_layer"] = f"partial(torch.nn.LayerNorm, eps={info.config.norm_eps})"
    given = ", ".join(f"{k}={v}" for k, v in shown.items())
    imports = (
        "import timm, torch; from functools import partial" if "partial" in given else "import timm"
    )
    return f"{imports}; model = timm.create_model({info.config.arch!r}, {given}).eval()"


FORMATS = {
    "timm": Format(
        "timm.safetensors", ((), ""), _write_own, _timm_features, is_encoder_file, _timm_usage
    ),
    "huggingface": Format(
        "huggingface",
        (("transformers",), "hf"),
        write_huggingface,
        huggingface_features,
        is_huggingface_export,
        lambda path, info: (
            "from transformers import AutoModel; "
            f"model = AutoModel.from_pretrained({str(path)!r}).eval()"
        ),
    ),
    "onnx": Format(
        "encoder.onnx",
        (("onnx", "onnxruntime", "onnxscript"), "onnx"),
        lambda path, encoder, info, crop_ratio: write_onnx(path, encoder, info),
        onnx_features,
        is_onnx_export,
        lambda path, info: (
            f"import onnxruntime; session = onnxruntime.InferenceSession({str(path)!r}); "
            "found = session.run(None, {'images': images})"
        ),
    ),
    "safetensors": Format(
        "encoder.safetensors",
        ((), ""),
        _write_own,
        _own_features,
        is_encoder_file,
        lambda path, info: (
            "from ssl_vit.weights.exchange import load_encoder; "
            f"encoder, info = load_encoder({str(path)!r})"
        ),
    ),
}


def check_ready(kind: str, out: Path) -> None:
    """Check that an export is possible, and ``out`` is free or an earlier export of its kind.

    Raises:
        UserError: a library is missing, the name is invalid, or another file exists there.
    """
    form = FORMATS[kind]
    modules, extra = form.needs
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"--to {kind} needs {module}: pip install 'ssl_vit[{extra}]' ({error})"
            ) from None
    suffix = Path(form.name).suffix
    what = f"a file whose name ends in {suffix}" if suffix else "a folder"
    check(not suffix or out.suffix == suffix, f"--out is {str(out)!r}; --to {kind} writes {what}")
    check(
        not out.exists() or (out.is_dir() == (not suffix) and form.is_ours(out)),
        f"--out is {str(out)!r}, which exists and is not an export to {kind}; "
        "it is not overwritten: give another name, or move it away",
    )
    beside = out.with_name(f"{out.name}.data")
    check(
        kind != "onnx" or out.exists() or not beside.exists(),
        f"--out is {str(out)!r}; weights of a large encoder go to {beside.name}, which exists",
    )


def sample_images(encoder: Encoder, info: EncoderInfo) -> Float[Tensor, "3 c h w"]:
    """Sample images: two photographs (scikit-learn's) and noise, prepared for the encoder."""
    from sklearn.datasets import load_sample_images

    photos = torch.stack([torch.from_numpy(i.copy()) for i in load_sample_images().images])
    photos = photos.permute(0, 3, 1, 2).float() / 255
    photos = F.interpolate(photos, encoder.image_size, mode="bicubic", antialias=True).clamp(0, 1)
    if encoder.channels == 1:
        photos = photos.mean(1, keepdim=True)
    photos = photos[:, torch.arange(encoder.channels) % photos.shape[1]]
    noise = torch.rand(photos[:1].shape, generator=torch.Generator().manual_seed(0))
    return Normalize(info.mean, info.std).images(torch.cat([photos, noise]))


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference by feature name; infinite where shapes differ."""
    assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
    return {
        name: (own - theirs[name]).abs().max().item()
        if own.shape == theirs[name].shape
        else float("inf")
        for name, own in ours.items()
    }


def export_encoder(
    encoder: Encoder, info: EncoderInfo, kind: str, out: Path, crop_ratio: float
) -> dict[str, float]:
    """Export to ``out``, open it with the other library, and keep it if the features agree.

    Both compute in float32 on the CPU, on :func:`sample_images`.

    Returns:
        The largest absolute difference, by the feature's name.

    Raises:
        UserError: that library has no equivalent model.
        RunFailed: its features differ. The new files are removed, an earlier export is kept.
    """
    form = FORMATS[kind]
    encoder = encoder.cpu().float().eval()
    # A temporary folder in which the file has its final name: timm decides by the suffix.
    room, new_parent = out.with_name(f".{out.name}.partial"), not out.parent.exists()
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    made = room / out.name
    try:
        form.write(made, encoder, info, crop_ratio)
        images = sample_images(encoder, info)
        with torch.inference_mode():
            differences = largest_difference(outputs(encoder, images), form.features(made, images))
        gaps = ", ".join(f"{name} by {value:.1e}" for name, value in differences.items())
        if not all(value < LIMIT for value in differences.values()):  # nor is NaN
            raise RunFailed(f"{kind} export: read back, features differ ({gaps}); nothing is kept")
        _place(room, out)
    finally:
        shutil.rmtree(room, ignore_errors=True)
        if new_parent and not out.exists():
            out.parent.rmdir()
    return differences


def _place(room: Path, out: Path) -> None:
    """Move the files of the temporary folder to their place, the export itself last."""
    for path in [p for p in room.rglob("*") if p.is_file()]:
        share_as_usual(path)
        sync(path)
    if out.is_dir():
        os.rename(out, room / "replaced")  # a folder cannot be renamed over another
    for path in sorted(room.iterdir(), key=lambda p: p.name == out.name):
        if path.name != "replaced":
            os.replace(path, out.with_name(path.name))
    sync(out.parent)
