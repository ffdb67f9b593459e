"""Embedding command: ``python -m ssl_vit.embed --encoder RUN --data.train ... --out x.npz``.

Options are read before torch is imported: what embeds is imported late.
"""

from __future__ import annotations

from ssl_vit.commands.cli import find_recipe, layered, run_door, split_config
from ssl_vit.commands.embed_options import EmbedConfig

_PROG = "python -m ssl_vit.embed"


def main(argv: list[str]) -> int:
    """Embedding command; returns the exit status."""
    configs, flags = split_config(argv)
    files = [find_recipe(c) for c in configs]
    about = EmbedConfig.__doc__ or ""
    config = layered(EmbedConfig(), files, flags, _PROG, about, EmbedConfig)
    from ssl_vit.commands.embedding import Embedding

    embedding = Embedding(config)
    table = embedding.run()
    if table is not None:
        left = f", {len(table.unreadable):,} left out as unreadable" if table.unreadable else ""
        print(f"features of {table.rows:,} images{left}: {embedding.out}")
    elif embedding.parallel.main:
        print(f"nothing to do: {embedding.out} is there, of the same encoder, images and options")
    return 0


if __name__ == "__main__":
    run_door(main)
