"""Export command: ``python -m ssl_vit.export --encoder RUN --to timm|huggingface|onnx ...``.

Options are read before torch is imported: what exports is imported late.
"""

from __future__ import annotations

from ssl_vit.commands.cli import find_recipe, layered, run_door, split_config
from ssl_vit.commands.export_options import ExportConfig
from ssl_vit.common.errors import check

_PROG = "python -m ssl_vit.export"


def main(argv: list[str]) -> int:
    """Export command; returns the exit status."""
    configs, flags = split_config(argv)
    files = [find_recipe(c) for c in configs]
    about = ExportConfig.__doc__ or ""
    config = layered(ExportConfig(), files, flags, _PROG, about, ExportConfig)
    for option, value in (("encoder", config.encoder), ("to", config.to)):
        check(bool(value), f"--{option} is missing")
    from ssl_vit.commands.exporting import export

    export(config)
    return 0


if __name__ == "__main__":
    run_door(main)
