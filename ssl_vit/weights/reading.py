"""Weight file reading, of any library, without executing anything in the file."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_vit.common.errors import UserError, check
from ssl_vit.weights.exchange import read_safetensors
from ssl_vit.weights.grids import Hints
from ssl_vit.weights.pickles import ALLOWED

FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
"""End of the name of an index, by which a large network of Hugging Face's lies in several files."""
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def read_content(path: Path) -> Any:
    """Read a safetensors file, one of ``torch.save``, or all files that an index of Hugging Face's
    names: tensors and plain values.

    Of classes, only those of ``pickles.ALLOWED`` are read, by stand-ins; nothing executes.

    Raises:
        UserError: damaged, of another format, one of several parts, or with objects of any other
            class.
    """
    if path.name.endswith(INDEX):
        return _all_parts(path)
    part = re.fullmatch(r"(.+)-(\d+)-of-(\d+)(\.\w+)", path.name)
    index = path.with_name(f"{part[1]}{part[4]}{INDEX}") if part else None
    if part and index and index.is_file():
        raise UserError(f"{path}: part {int(part[2])} of {int(part[3])}; give {index}")
    return _one_file(path)


def _one_file(path: Path) -> Any:
    """Content of one file (:func:`read_content`)."""
    with open(path, "rb") as file:
        start = file.read(9)
    # The leading safetensors header length may look like either; it is followed by {.
    if start[8:] == b"{" or not start.startswith((b"PK", b"\x80")):
        return read_safetensors(path)[0]
    # Tensors in a zip are read lazily: in a checkpoint, most belong to the optimizer.
    lazily = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            # Warnings on the pickle protocol; errors are reported in one line below.
            warnings.simplefilter("ignore")
            if path.suffix == ".safetensors":  # torch decides by the suffix, not the content
                with open(path, "rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except Exception as error:  # damaged files raise all kinds
        raise UserError(f"{path}: {_reason(error)}") from None


def _all_parts(index: Path) -> dict[str, Tensor]:
    """Tensors of all files that an index names, each from the file it is said to be in.

    Raises:
        UserError: no index, or a file or a tensor is missing.
    """
    places = read_json(index).get("weight_map")
    places = places if isinstance(places, dict) else {}
    beside = [isinstance(v, str) and v == Path(v).name for v in places.values()]
    check(
        all(beside) and len(beside) > 0, f"{index}: no weight_map from tensors to files beside it"
    )
    names = sorted(set(places.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    check(
        not missing,
        f"{index}: {len(missing)} of its {len(names)} files are missing: {', '.join(missing[:3])}",
    )
    found: dict[str, Tensor] = {}
    for name in names:
        part = _one_file(index.parent / name)
        wanted = [tensor for tensor, place in places.items() if place == name]
        lost = [tensor for tensor in wanted if tensor not in part]
        check(not lost, f"{index.parent / name}: tensors are missing: {', '.join(lost[:3])}")
        found |= {tensor: part[tensor] for tensor in wanted}
    return found


def _reason(error: Exception) -> str:
    """Reason in one line why ``torch.load`` refused a file."""
    found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"global (\S+)", str(error))
    if found and "sharded_tensor" in found[1]:
        return (
            "refused: one process's part of a sharded network (ShardedTensor); DINOv2 writes the "
            "whole teacher to eval/training_N/teacher_checkpoint.pth of the same run: give that"
        )
    if found:
        return (
            f"refused: a pickle of {found[1]}; allowed: tensors and plain values. Where you trust "
            "the file, save its tensors alone (its 'model' or 'state_dict') and give that"
        )
    return f"damaged, or not a file of weights ({one_line(error)})"


def one_line(error: BaseException) -> str:
    """First line of an error message, or the error type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; empty if there is no such file.

    Raises:
        UserError: not JSON, or not an object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({one_line(error)})") from None
    check(isinstance(content, dict), f"{path}: must contain a JSON object")
    return dict(content)


def heads_of(config: dict[str, Any], where: Path) -> int:
    """Number of attention heads in the configuration beside a file; 0 if it does not say.

    Raises:
        UserError: a value of the wrong type.
    """
    heads = config.get("num_attention_heads", 0)
    check(type(heads) is int, f"{where.parent / 'config.json'}: num_attention_heads is {heads!r}")
    return int(heads)


def stated_size(options: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of images in the options of a training; None if they do not say.

    MAE's ``input_size`` is one number; forks have two, and timm's the channels before them.
    """
    for name in ("input_size", "img_size", "image_size"):
        value = options.get(name)
        sides = [value] if isinstance(value, int) else value
        if isinstance(sides, list | tuple) and sides and all(type(s) is int for s in sides):
            height, width = (sides[0], sides[0]) if len(sides) == 1 else sides[-2:]
            return int(height), int(width)
    return None


def hints_of(config: dict[str, Any], kind: str, where: Path) -> Hints:
    """Architecture hints of a Hugging Face configuration; an empty one gives the usual values.

    Raises:
        UserError: a value of the wrong type, or an activation other than GELU.
    """
    eps = config.get("layer_norm_eps", 1e-6 if "Dinov2" in kind else 1e-12)
    heads = config.get("num_attention_heads", 0)
    size = config.get("image_size")
    size = [size, size] if isinstance(size, int) else size
    whole = isinstance(heads, int) and isinstance(eps, float) and eps > 0
    whole = whole and (size is None or [type(side) for side in size] == [int, int])
    check(whole, f"{where.parent / 'config.json'}: heads {heads}, epsilon {eps}, image size {size}")
    act = config.get("hidden_act", "gelu")
    check(act == "gelu", f"{where.parent / 'config.json'}: hidden_act is {act!r}; it must be gelu")
    return Hints("", heads, eps, tuple(size) if size else None)


def preprocessing(folder: Path | None) -> Statistics | None:
    """Pixel statistics (mean, standard deviation) in a Hugging Face folder; None if missing."""
    path = folder / "preprocessor_config.json" if folder else None
    content = read_json(path) if path else {}
    found = [content.get(key) for key in ("image_mean", "image_std")]
    if found == [None, None]:
        return None
    whole = all(isinstance(v, list) and all(isinstance(x, float | int) for x in v) for v in found)
    check(whole, f"{path}: image_mean and image_std must be numbers, not {found}")
    mean, std = (tuple(map(float, values or ())) for values in found)
    check(len(mean) == len(std) and all(s > 0 for s in std), f"{path}: image_std is {std}")
    return mean, std
