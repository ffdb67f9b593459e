"""Visualization command: ``python -m ssl_vit.visualize attention --encoder RUN --images ...``.

Options are read before torch is imported: what draws is imported late.
"""

from __future__ import annotations

from ssl_vit.commands.cli import find_recipe, layered, run_door, split_config, subcommand
from ssl_vit.commands.picture_options import PICTURES

_PROG = "python -m ssl_vit.visualize"


def main(argv: list[str]) -> int:
    """Visualization command; returns the exit status."""
    name = subcommand(argv, _PROG, "picture", list(PICTURES))
    configs, flags = split_config(argv[1:])
    kind = PICTURES[name]
    files = [find_recipe(c) for c in configs]
    config = layered(kind(), files, flags, f"{_PROG} {name}", kind.__doc__ or "", kind)
    from ssl_vit.commands.drawing import draw

    draw(name, config)
    return 0


if __name__ == "__main__":
    run_door(main)
