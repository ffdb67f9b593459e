"""Benchmark command: ``python -m ssl_vit.benchmark step|loader|end-to-end|scale METHOD``,
``detection``, ``quality``, ``device`` or ``scenes``.

Options are read before torch is imported: what measures is imported late.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ssl_vit.commands import device_needs

if __name__ == "__main__" and sys.argv[1:2] == ["device"]:
    device_needs.refuse_missing()  # of which what follows imports some

from ssl_vit.commands import detection_options, device_options, quality_options, scenes_options
from ssl_vit.commands.benchmark_options import BENCHMARKS, check_out
from ssl_vit.commands.cli import find_recipe, layered, run_door, split_config, subcommand
from ssl_vit.commands.pretrain_options import default_options
from ssl_vit.methods import find_options, method_names

_PROG = "python -m ssl_vit.benchmark"


def parse_options(argv: Sequence[str]) -> tuple[str, str, Any]:
    """Benchmark, method name, and the options: method < YAML < command line."""
    others = ["detection", "quality", "device", "scenes"]
    what = subcommand(argv, _PROG, "benchmark", [*BENCHMARKS, *others])
    name = subcommand(argv[1:], f"{_PROG} {what}", "method", method_names())
    configs, flags = split_config(argv[2:])
    own, options = find_options(name), BENCHMARKS[what]
    default = default_options(options, own, data={"train": ""})
    files = [find_recipe(c) for c in configs]
    about, prog = options.__doc__ or "", f"{_PROG} {what} {name}"
    config = layered(default, files, flags, prog, about, options[own.config])
    return what, name, config


def main(argv: list[str]) -> int:
    """Benchmark command; returns the exit status."""
    if argv[:1] == ["detection"]:
        given = detection_options.parse_options(argv[1:])
        from ssl_vit.commands import detection

        return detection.measure(given)
    if argv[:1] == ["quality"]:
        plan = quality_options.parse_options(argv[1:])
        from ssl_vit.commands import quality

        return quality.compare(plan)
    if argv[:1] == ["device"]:
        asked = device_options.parse_options(argv[1:])
        from ssl_vit.commands import device

        return device.prove(asked)
    if argv[:1] == ["scenes"]:
        wanted = scenes_options.parse_options(argv[1:])
        from ssl_vit.commands import scenes

        return scenes.make(wanted)
    what, name, config = parse_options(argv)
    check_out(config.out)
    from ssl_vit.commands.benchmarking import measure

    measure(what, name, config)
    return 0


if __name__ == "__main__":
    run_door(main)
