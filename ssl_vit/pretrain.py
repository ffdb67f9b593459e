"""Pretraining command: ``python -m ssl_vit.pretrain mae [--config FILE] [--group.option ...]``.

Options are read before torch is imported: what trains is imported late.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ssl_vit.commands.cli import find_recipe, layered, recipes, run_door, split_config, subcommand
from ssl_vit.commands.pretrain_options import PretrainConfig, default_options
from ssl_vit.methods import find_options, method_names
from ssl_vit.training.run_files import slug

log = logging.getLogger("ssl_vit")
_PROG = "python -m ssl_vit.pretrain"
_ABOUT = "Pretrain a Vision Transformer on images without labels."


def parse_options(argv: list[str]) -> tuple[str, PretrainConfig[Any]]:
    """Method name and the options: defaults < method < YAML < command line."""
    name = subcommand(argv, _PROG, "method", method_names())
    configs, flags = split_config(argv[1:])
    own = find_options(name)
    given = any(f.split("=")[0] in ("--data.train", "--init.encoder") for f in flags)
    if not configs and not given and f"{name}_digits" in recipes():
        configs = [f"{name}_digits"]
        if "--help" not in flags and "-h" not in flags:
            log.info("no --config and no --data.train: using the recipe %s", configs[0])
    default = default_options(PretrainConfig, own)
    kind = PretrainConfig[own.config]  # type: ignore[name-defined]
    files = [find_recipe(c) for c in configs]
    config = layered(default, files, flags, f"{_PROG} {name}", _ABOUT, kind)
    if config.init.encoder:
        from ssl_vit.commands.initial_weights import with_statistics, with_weights
        from ssl_vit.weights.official import weights_info

        info = weights_info(config.init.encoder, config.encoder.image_size, "--init.encoder")[0]
        default = with_weights(default, info, config.init.heads, bool(config.init.lora))
        config = layered(default, files, flags, f"{_PROG} {name}", _ABOUT, kind)
        config = with_statistics(config, info)
    if not config.run.out:
        out = f"runs/{name}-{slug(config.data.train)}"
        config = replace(config, run=replace(config.run, out=out))
    return name, config


def main(argv: list[str]) -> int:
    """Pretraining command; returns the exit status."""
    name, config = parse_options(argv)
    from ssl_vit.commands.pretraining import build
    from ssl_vit.commands.results import show_results
    from ssl_vit.commands.running import carry_out

    session = build(name, config)
    if config.dry_run:
        from ssl_vit.commands.preflight import preflight

        return preflight(session)
    return carry_out(session, session.about(), show_results, f"{_PROG} {name}")


if __name__ == "__main__":
    run_door(main)
