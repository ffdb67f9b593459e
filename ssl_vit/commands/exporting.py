"""Export of an encoder: opened, written in another format, read back, and reported."""

from __future__ import annotations

import logging
from pathlib import Path

from ssl_vit.commands.export_options import ExportConfig
from ssl_vit.common.errors import check
from ssl_vit.data.view import View
from ssl_vit.weights.official import open_weights
from ssl_vit.weights.outgoing import FORMATS, check_ready, export_encoder
from ssl_vit.weights.own_files import BEST_FILE, ENCODER_FILE

log = logging.getLogger("ssl_vit")


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


def export(config: ExportConfig) -> None:
    """Export an encoder, and print where it is and how to open it.

    Raises:
        UserError: the encoder cannot be opened, or the export not be written.
    """
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
