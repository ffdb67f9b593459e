"""Weight file reading, of any library, without executing anything in the file."""

from __future__ import annotations

import argparse
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
from ssl_vit.weights.shapes import Hints

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def read_content(path: Path) -> Any:
    """Read a safetensors file or one of ``torch.save``: tensors and plain values.

    The only class allowed is ``argparse.Namespace``, in which the official releases of MAE and DINO
    store their options: it contains values and executes nothing.

    Raises:
        UserError: damaged, of another format, or with objects of any other class.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    # The leading safetensors header length may look like either; it is followed by {.
    if start[8:] == b"{" or not start.startswith((b"PK", b"\x80")):
        return read_safetensors(path)[0]
    # Tensors in a zip are read lazily: in a checkpoint, most belong to the optimizer.
    lazily = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # Warnings on the pickle protocol; errors are reported in one line below.
            warnings.simplefilter("ignore")
            if path.suffix == ".safetensors":  # torch decides by the suffix, not the content
                with open(path, "rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except Exception as error:  # damaged files raise all kinds
        raise UserError(f"{path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Reason in one line why ``torch.load`` refused a file."""
    foreign = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"global (\S+)", str(error))
    if foreign:
        return f"refused: a pickle of {foreign[1]}; allowed: tensors and plain values"
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


def unwrapped(content: Any, where: str) -> tuple[str, dict[str, Tensor]]:
    """Unwrap the tensors of a file; also the key they were under: teacher, model, state_dict or "".

    A common prefix of wrapped modules, ``module.`` or ``_orig_mod.``, is removed. Of DINO's student
    and teacher, the teacher is used.

    Raises:
        UserError: it contains no named tensors.
    """
    wrapper = ""
    if isinstance(content, dict):
        known = ("teacher", "model", "state_dict")
        wrapper = next((k for k in known if isinstance(content.get(k), dict)), "")
    state = content[wrapper] if wrapper else content
    whole = isinstance(state, dict) and len(state) > 0
    if not whole or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        keys = f", with keys {', '.join(map(str, list(content)[:5]))}" if content else ""
        keys = keys if isinstance(content, dict) else ""
        raise UserError(f"{where}: no weights: not a dictionary of named tensors{keys}")
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return wrapper, dict(state)


def heads_of(config: dict[str, Any], where: Path) -> int:
    """Number of attention heads in the configuration beside a file; 0 if it does not say.

    Raises:
        UserError: a value of the wrong type.
    """
    heads = config.get("num_attention_heads", 0)
    check(type(heads) is int, f"{where.parent / 'config.json'}: num_attention_heads is {heads!r}")
    return int(heads)


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
