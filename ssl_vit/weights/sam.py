"""SAM's image encoder (Kirillov et al. 2023): official files as weights of timm's network.

timm's has the epsilon 1e-5 in the LayerNorm of its blocks, the official ``build_sam`` 1e-6.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer_sam import checkpoint_filter_fn

from ssl_vit.common.errors import UserError, check
from ssl_vit.weights.reading import read_content
from ssl_vit.weights.unwrapping import State, unwrapped

FORMAT = "SAM (official)"
_PREFIX = "image_encoder."
_FIRST = f"{_PREFIX}patch_embed.proj.weight"
# By width and depth.
_PUBLISHED = {
    (768, 12): "samvit_base_patch16",
    (1024, 24): "samvit_large_patch16",
    (1280, 32): "samvit_huge_patch16",
}

_TELLING = (
    "patch_embed.proj.weight",
    "pos_embed",
    "blocks.0.attn.rel_pos_h",
    "blocks.0.mlp.fc1.weight",
    "neck.0.weight",
)


@dataclass(frozen=True)
class Sam:
    """SAM's image encoder in a file: the call of timm that builds it, and a report of it.

    ``arch`` and ``options``: arguments of ``timm.create_model``.
    """

    arch: str
    options: dict[str, Any]
    report: str

    @property
    def published(self) -> bool:
        """True if it is one of the three published architectures."""
        width, depth = self.options["embed_dim"], self.options["depth"]
        return (width, depth) in _PUBLISHED and self.options["img_size"] == (1024, 1024)


def open_sam(path: Path) -> Sam | None:
    """The image encoder of an official SAM, recognised by its tensors; None for any other file.

    Raises:
        UserError: a SAM whose image encoder is not whole.
    """
    if not _worth_reading(path):
        return None
    try:
        state = unwrapped(read_content(path), str(path)).state
    except UserError:  # reported where the file is opened as another one
        return None
    return found_in(state, str(path)) if _FIRST in state else None


def found_in(state: State, where: str) -> Sam:
    """The image encoder among the tensors of a SAM.

    Raises:
        UserError: it is not whole.
    """
    own = timm_names(state)
    arch, options = _architecture(own, where)
    others = Counter(k.partition(".")[0] for k in state if not k.startswith(_PREFIX))
    left = ", ".join(f"{part} {count}" for part, count in sorted(others.items()))
    report = f"image encoder, {len(own)} tensors" + (f"; left out: {left}" if left else "")
    return Sam(arch, options, report)


def timm_names(state: State) -> State:
    """Tensors of the image encoder under timm's names; those of other files as they are."""
    return dict(checkpoint_filter_fn(state, None)) if _FIRST in state else state


def _worth_reading(path: Path) -> bool:
    """True for a file that may be a SAM, by what is quick to read."""
    if not path.is_file():
        return False
    if zipfile.is_zipfile(path):  # whose tensors are read lazily
        return True
    try:
        with safe_open(path, "pt") as file:
            return any(k.endswith(_FIRST) for k in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _architecture(state: State, where: str) -> tuple[str, dict[str, Any]]:
    """Architecture by the tensors' shapes: timm's name, and the arguments of its call.

    Blocks with a table of relative positions as large as the image see it whole, others windows.

    Raises:
        UserError: a tensor that it follows from is missing.
    """
    missing = [name for name in _TELLING if name not in state]
    first = f"{_PREFIX}{missing[0]}" if missing else ""
    check(not missing, f"{where}: looks like a SAM, but {first} is missing")
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    rows, columns = state["pos_embed"].shape[1:3]
    tables = [state[f"blocks.{i}.attn.rel_pos_h"] for i in _blocks(state)]
    reach = [(len(table) + 1) // 2 for table in tables]
    windows = [size for size in reach if size != rows]
    options = {
        "img_size": (rows * patch, columns * patch),
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": width,
        "depth": len(tables),
        "num_heads": width // tables[0].shape[1],
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "window_size": windows[0] if windows else 0,
        "global_attn_indexes": tuple(i for i, size in enumerate(reach) if size == rows),
        "neck_chans": state["neck.0.weight"].shape[0],
    }
    return _PUBLISHED.get((width, len(tables)), "samvit_base_patch16"), options


def _blocks(state: State) -> range:
    """Indices of the blocks that have a table of relative positions."""
    return range(sum(k.startswith("blocks.") and k.endswith(".attn.rel_pos_h") for k in state))
