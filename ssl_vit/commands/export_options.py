"""Options of an export."""

from __future__ import annotations

from dataclasses import dataclass

from ssl_vit.common.checks import check_file, check_size
from ssl_vit.common.errors import check, did_you_mean
from ssl_vit.weights.own_files import EXPORTS


@dataclass(frozen=True)
class ExportConfig:
    """Export of an encoder to a file of another library, verified with that library."""

    config: str = ""
    """A YAML file of these options. The command line wins."""
    encoder: str = ""
    """A run folder, an encoder file, or other weights: an official file of MAE or DINO (1 to 3), a
    Hugging Face folder, timm:NAME:FILE, timm:NAME."""
    size: tuple[int, ...] = ()
    """Height and width in pixels of the images that the encoder was trained on, where its file does
    not say and its positions are no square grid."""
    to: str = ""
    """timm (a file for timm.create_model), huggingface (a folder for transformers.AutoModel), onnx,
    or safetensors (our own encoder file)."""
    out: str = ""
    """File, or folder for huggingface. An earlier export of the same kind is replaced, nothing else
    is. Empty: export/timm.safetensors, export/huggingface, export/encoder.onnx or
    export/encoder.safetensors in the run folder, or beside the encoder file."""

    def __post_init__(self) -> None:
        check_size(self, "size")
        names = ", ".join(EXPORTS)
        check(
            self.to in ("", *EXPORTS),
            f"--to is {self.to!r}; it must be one of {names}{did_you_mean(self.to, EXPORTS)}",
        )
        check_file(self.out)
