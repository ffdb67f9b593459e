"""Python API for notebooks and scripts: encoders, and networks trained on them, with their image
preprocessing, each in one call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ssl_vit.common.errors import UserError, check
from ssl_vit.data.augment import center_view
from ssl_vit.data.batch import stack
from ssl_vit.data.decode import BadImage, OtherChannels, decode
from ssl_vit.data.missing import with_data
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.view import View
from ssl_vit.evaluators.backbone import open_backbone
from ssl_vit.evaluators.features import ready
from ssl_vit.evaluators.reopen import open_tuned
from ssl_vit.evaluators.tuned import Tuned
from ssl_vit.model.attention import cls_attention
from ssl_vit.model.encoder import Encoder, Features
from ssl_vit.training.parallel import exact_kernels, resolve_device

ImageLike = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
Images = ImageLike | Sequence[ImageLike]
_AT_ONCE = 64


class LoadedEncoder:
    """Loaded encoder: a frozen pretrained encoder together with its image preprocessing.

    Images are paths, encoded bytes, ``PIL.Image``, arrays (H, W) or (H, W, C), tensors (C, H, W):
    one, or a sequence of any sizes; or a tensor (B, C, H, W). Tensors and arrays hold pixel values
    as in a file, not normalised: uint8, or float for images of more than 8 bits, with NaN where
    there is no data.

    Attributes:
        name: the name it was loaded by.
        module: the ``Encoder`` in evaluation mode; its ``vit`` is a timm ``VisionTransformer``.
        view: size, channels and statistics of the preprocessing.
        device: the device of the encoder.
    """

    def __init__(self, name: str, module: Encoder, view: View, device: torch.device) -> None:
        self.name, self.module, self.view, self.device = name, module, view, device
        exact_kernels(device)
        ready(module, device)
        self._normalize = Normalize(view.mean, view.std).to(device)

    def transform(self, images: Images) -> Float[Tensor, "b c h w"]:
        """Preprocessed images: central crop, resized bicubically, normalised, on the device.

        The preprocessing is that of the evaluators; pixels without data are 0, the mean.

        Raises:
            UserError: an image cannot be read, is no image, has other channels, or holds no data.
        """
        crops = [self._crop(image, i) for i, image in enumerate(_each(images))]
        check(bool(crops), "no image is given")
        return self._normalize.images(stack(crops).to(self.device))

    @torch.inference_mode()
    def features(self, images: Images) -> Features:
        """Features of images, float32, on the encoder's device.

        ``cls`` (B, D) or None, ``patches`` (B, N, D) and their ``grid`` (rows, columns);
        ``pool("mean")``, ``pool("cls")`` or ``pool("cls+mean")`` gives one vector per image.

        Raises:
            UserError: as :meth:`transform`.
        """
        made = [self.module(self.transform(part)) for part in _parts(images)]
        cls = torch.cat([f.cls for f in made]) if made[0].cls is not None else None
        return Features(cls, torch.cat([f.patches for f in made]), made[0].grid, made[0].norm)

    @torch.inference_mode()
    def attention(self, images: Images) -> Float[Tensor, "b heads rows columns"]:
        """Attention of [CLS] to the patches in the last block, for each head.

        The values of a head sum to at most 1; the rest goes to [CLS] and registers.

        Raises:
            UserError: as :meth:`transform`; or the encoder has no [CLS].
        """
        made = [cls_attention(self.module, self.transform(part)) for part in _parts(images)]
        return torch.cat([rows for rows, _ in made]).unflatten(-1, made[0][1])

    def _crop(self, image: ImageLike, number: int) -> Tensor:
        with _named(image, number, self.name):
            pixels = decode(_raw(image), self.view.channels)
            view = center_view(pixels, self.view.size, self.view.crop_ratio)
            return with_data(view, "the central crop")

    def __repr__(self) -> str:
        size = "x".join(map(str, self.view.size))
        arch, channels = self.module.config.arch, self.view.channels
        shape = f"{channels} channels of {size} pixels, patch {self.module.patch_size}"
        return f"LoadedEncoder({self.name!r}: {arch}, {self.module.width} features, {shape})"


def load_encoder(
    name: str | Path, size: int | tuple[int, int] | None = None, device: str = "auto"
) -> LoadedEncoder:
    """Pretrained encoder from a run folder, or from any weight file that the evaluators accept.

    Args:
        name: a run folder; a file of ours, of the official MAE and DINO (1 to 3) releases or of
            timm; a Hugging Face folder; ``timm:NAME``; ``random:`` before any of them.
        size: height and width that images are resized to, or one number for both, divisible by the
            patch size; None: those of the encoder.
        device: auto, cpu, cuda, cuda:1 or mps. On CUDA, TF32 convolutions and cuDNN's attention
            are turned off in this process.

    Raises:
        UserError: no such encoder, its weights do not fit, or it is no plain ViT.
    """
    given = () if size is None else (size,) if isinstance(size, int) else tuple(size)
    backbone = open_backbone(str(name), seed=0, size=given)
    module = backbone.module
    check(isinstance(module, Encoder), f"{str(name)!r} is no plain ViT: it has no patch features")
    assert isinstance(module, Encoder)
    return LoadedEncoder(str(name), module, backbone.view, resolve_device(device))


class LoadedModel:
    """Loaded model: a network that ``evaluate finetune`` or ``detect`` trained, with its image
    preprocessing. Images are those of :class:`LoadedEncoder`, of any sizes.

    Attributes:
        name: the name it was loaded by.
        kind: what it predicts: ``classes``, ``segment``, ``depth`` or ``detect``.
        classes: names of its classes, None where it has none.
        module: the network in evaluation mode: timm's, torchvision's detector, or an encoder with a
            head.
        view: size, channels and statistics of the preprocessing.
        device: the device of the network.
    """

    def __init__(self, name: str, tuned: Tuned, device: torch.device) -> None:
        self.name, self.kind, self.classes = name, tuned.kind, tuned.names
        self.module, self.view, self.device = tuned.network, tuned.view, device
        self._tuned = tuned
        exact_kernels(device)
        tuned.ready(device)

    @torch.inference_mode()
    def predict(self, images: Images) -> Any:
        """Predictions for images, on the CPU. By ``kind``:

        - ``classes``: (B, classes) float32, probabilities; of several labels an image, of each.
        - ``segment``: for each image (H, W) int64, the class of each pixel, in the image's size.
        - ``depth``: for each image (H, W) float32, in the unit that ``--depth.scale`` led to.
        - ``detect``: for each image a dictionary, objects in the order of their scores: ``boxes``
          (k, 4) left, top, right, bottom in pixels of the image, ``labels`` (k,) int64, ``scores``
          (k,) and, of a detector with masks, ``masks`` (k, H, W) bool. Labels count from 0, as
          ``classes`` do: there is none for the background.

        Raises:
            UserError: an image cannot be read, is no image, has other channels, or holds no data.
        """
        every = _each(images)
        check(bool(every), "no image is given")
        made, at_once = [], self._tuned.at_once
        for first in range(0, len(every), at_once):
            some = every[first : first + at_once]
            pixels = [self._decoded(image, first + i) for i, image in enumerate(some)]
            made.append(self._tuned.predict(pixels))
        return torch.cat(made) if self.kind == "classes" else [one for part in made for one in part]

    def _decoded(self, image: ImageLike, number: int) -> Tensor:
        with _named(image, number, self.name):
            return self._tuned.prepared(decode(_raw(image), self.view.channels))

    def __repr__(self) -> str:
        size = "x".join(map(str, self.view.size))
        classes = "" if self.classes is None else f"{len(self.classes)} classes, "
        shape = f"{self.view.channels} channels of {size} pixels"
        return f"LoadedModel({self.name!r}: {self.kind}, {classes}{shape})"


def load_model(name: str | Path, device: str = "auto") -> LoadedModel:
    """Network that ``evaluate finetune`` or ``evaluate detect`` trained.

    Args:
        name: its run folder, or its file: ``model.safetensors``, ``detector.safetensors``.
        device: as of :func:`load_encoder`.

    Raises:
        UserError: there is none, it is of another version, or its tensors do not match.
    """
    return LoadedModel(str(name), open_tuned(name), resolve_device(device))


@contextlib.contextmanager
def _named(image: ImageLike, number: int, owner: str) -> Iterator[None]:
    """Errors of an image, which name it."""
    what = image if isinstance(image, str | os.PathLike) else f"image {number}"
    try:
        yield
    except OtherChannels as error:
        takes = f"{owner} takes images of {error.asked}"
        raise UserError(f"{what}: has {error.has} channels; {takes}") from None
    except (BadImage, OSError) as error:
        raise UserError(f"{what}: {getattr(error, 'strerror', None) or error}") from None


def _each(images: Images) -> Sequence[ImageLike]:
    """Sequence of images; a single image becomes a sequence of one."""
    if isinstance(images, Tensor):
        check(
            images.ndim in (2, 3, 4), f"a tensor of images has 2 to 4 dimensions, not {images.ndim}"
        )
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    one = isinstance(images, str | os.PathLike | bytes | Image.Image)
    return [images] if one else list(images)  # type: ignore[arg-type, list-item]


def _parts(images: Images) -> list[Sequence[ImageLike]]:
    """Parts of at most 64 images, which bounds the memory of the network."""
    every = _each(images)
    return [every[i : i + _AT_ONCE] for i in range(0, max(1, len(every)), _AT_ONCE)]


def _raw(image: ImageLike) -> bytes | np.ndarray:
    """Input of ``decode``: encoded bytes or an array (H, W) or (H, W, C)."""
    if isinstance(image, Tensor):
        array = image.detach().cpu().numpy()
        return np.ascontiguousarray(array.transpose(1, 2, 0) if image.ndim == 3 else array)
    if isinstance(image, Image.Image):
        plain = image if image.mode in ("L", "RGB", "I;16", "I", "F") else image.convert("RGB")
        return np.asarray(plain)
    if isinstance(image, np.ndarray | bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return Path(image).expanduser().read_bytes()
    raise UserError(f"a {type(image).__name__} is no image; give a path, bytes, array or tensor")
