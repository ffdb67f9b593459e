"""Export command: ``python -m ssl_vit.export --encoder RUN --to timm|huggingface|onnx ...``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ssl_vit.commands.cli import find_recipe, layered, run_door, split_config
from ssl_vit.common.checks import check_size
from ssl_vit.common.errors import check, did_you_mean
from ssl_vit.data.view import View
from ssl_vit.weights.exchange import BEST_FILE, ENCODER_FILE
from ssl_vit.weights.official import open_weights
from ssl_vit.weights.outgoing import FORMATS, check_ready, export_encoder

log = logging.getLogger("ssl_vit")
_PROG = "python -m ssl_vit.export"


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
        names = ", ".join(FORMATS)
        check(
            self.to in ("", *FORMATS),
            f"--to is {self.to!r}; it must be one of {names}{did_you_mean(self.to, FORMATS)}",
        )
        parent = Path(self.out).expanduser().absolute().parent
        check(parent.is_dir(), f"--out is {self.out!r}; there is no folder {str(parent)!r}")


def place_for(config: ExportConfig, encoder_file: Path) -> Path:
    """Path of the export.

    Raises:
        UserError: a file there must not be replaced, or a library is missing.
    """
    cached = config.encoder.startswith("timm:") and config.encoder.count(":") == 1
    check(bool(config.out) or not cached, "--out is missing; timm's file is in a cache folder")
    beside = encoder_file.absolute().parent / "export" / FORMATS[config.to].name
    out = Path(config.out).expanduser() if config.out else beside
    same = out.exists() and out.samefile(encoder_file)
    check(not same, f"--out is {str(out)!r}, which is the encoder to export")
    a_runs_own = out.name in (ENCODER_FILE, BEST_FILE) and (out.parent / "config.yaml").exists()
    check(not a_runs_own, f"--out is {str(out)!r}, which is the encoder file of a run")
    check_ready(config.to, out)
    return out


def megabytes(path: Path) -> float:
    """Size in MB of a file, including ONNX's external weights, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path, path.with_name(f"{path.name}.data")]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def main(argv: list[str]) -> int:
    """Export command; returns the exit status."""
    configs, flags = split_config(argv)
    files = [find_recipe(c) for c in configs]
    about = ExportConfig.__doc__ or ""
    config = layered(ExportConfig(), files, flags, _PROG, about, ExportConfig)
    for option, value in (("encoder", config.encoder), ("to", config.to)):
        check(bool(value), f"--{option} is missing")
    opened = open_weights(config.encoder, config.size)
    log.info("%s", opened.report)
    encoder, info = opened.encoder, opened.info
    out = place_for(config, opened.path)
    view = View(encoder.image_size, info.channels, info.mean, info.std)
    differences = export_encoder(encoder, info, config.to, out, view.crop_ratio)
    errors = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    print(f"{config.to}: {out}, {megabytes(out):.1f} MB")
    print(f"read back, features differ by at most: {errors}")
    print(FORMATS[config.to].usage(out, info))
    return 0


if __name__ == "__main__":
    run_door(main)
