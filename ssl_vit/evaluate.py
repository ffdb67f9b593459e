"""Evaluation command: ``python -m ssl_vit.evaluate linear --encoder RUN_OR_FILE ...``.

Options are read before torch is imported: what evaluates is imported late.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from ssl_vit.commands import compare_options, detect_options
from ssl_vit.commands.cli import find_recipe, layered, run_door, split_config, subcommand
from ssl_vit.commands.eval_options import EvalConfig
from ssl_vit.commands.finetune_options import first_options
from ssl_vit.commands.probe_options import PROBES
from ssl_vit.common.duration import duration
from ssl_vit.common.errors import check

log = logging.getLogger("ssl_vit")
_PROG = "python -m ssl_vit.evaluate"


def check_place(config: EvalConfig) -> None:
    """Check, before the work, that the result can be written.

    Raises:
        UserError: it cannot.
    """
    place = Path(config.out or config.encoder.rpartition(":")[2]).expanduser()
    if config.out or place.exists():
        check(
            not config.out or not place.is_dir(), f"--out is {config.out!r}, a folder; name a file"
        )
        folder = place if place.is_dir() else place.parent
        while config.out and not folder.exists():  # it is made when there is a result
            folder = folder.parent
        usable = folder.is_dir() and os.access(folder, os.W_OK)
        check(
            usable,
            f"the result cannot be written to {folder}; give --out FILE in a folder that can",
        )


def split_lists(flags: Sequence[str]) -> list[str]:
    """Arguments with lists such as ``1,2,5`` split into single numbers."""
    lists = re.compile(r"\d+(\.\d+)?(,\d+(\.\d+)?)+")
    return [n for f in flags for n in (f.split(",") if lists.fullmatch(f) else [f])]


def main(argv: list[str]) -> int:
    """Evaluation command; returns the exit status."""
    name = subcommand(argv, _PROG, "evaluator", [*PROBES, "finetune", "detect", "compare", "again"])
    if name == "finetune":
        first_options(argv[1:])
        from ssl_vit.commands import finetuning

        return finetuning.main(argv[1:])
    if name == "detect":
        detect_options.read_options(argv[1:])
        from ssl_vit.commands import detecting

        return detecting.main(argv[1:])
    if name == "compare":
        config = compare_options.parse_options(argv[1:])
        from ssl_vit.commands.compare import compare

        return compare(config)
    if name == "again":
        usage = f"usage: {_PROG} again CARD.json [--data.val IMAGES] [--run.out FOLDER]"
        check(len(argv) > 1 and not argv[1].startswith("-"), usage)
        from ssl_vit.commands.probing import again

        return again(argv[1], argv[2:])
    return probe(name, argv[1:])


def probe(name: str, argv: list[str]) -> int:
    """Evaluation of one encoder; returns the exit status."""
    started = time.perf_counter()
    configs, flags = split_config(split_lists(argv))
    kind = PROBES[name]
    files = [find_recipe(c) for c in configs]
    config = layered(kind(), files, flags, f"{_PROG} {name}", kind.__doc__ or "", kind)
    if os.environ.get("RANK", "0") == "0":
        check_place(config)
    from ssl_vit.commands.probing import evaluate

    evaluate(name, config)
    log.info("done in %s", duration(time.perf_counter() - started))
    return 0


if __name__ == "__main__":
    run_door(main)
