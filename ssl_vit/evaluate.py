"""Evaluation command: ``python -m ssl_vit.evaluate linear --encoder RUN_OR_FILE ...``."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ssl_vit.commands import compare
from ssl_vit.commands import finetuning as finetune
from ssl_vit.commands.cli import (
    find_recipe,
    layered,
    run_door,
    show_table,
    split_config,
    subcommand,
)
from ssl_vit.commands.evaluating import EvalConfig
from ssl_vit.commands.probes import (
    KnnConfig,
    LinearConfig,
    Result,
    SegmentConfig,
    knn,
    linear,
    segment,
)
from ssl_vit.common.distributed import rank_and_world
from ssl_vit.common.errors import check
from ssl_vit.common.layers import known_keys, parse, tree_flags
from ssl_vit.evaluators.protocol import check_same, read_card, write_card
from ssl_vit.evaluators.scores import Score
from ssl_vit.training.metrics import duration

log = logging.getLogger("ssl_vit")
_PROG = "python -m ssl_vit.evaluate"
_PROBES: dict[str, tuple[type[EvalConfig], Callable[[Any], Result]]] = {
    "knn": (KnnConfig, knn),
    "linear": (LinearConfig, linear),
    "segment": (SegmentConfig, segment),
}
_OTHERS = {"finetune": finetune.main, "compare": compare.main}


def run(name: str, config: EvalConfig) -> Result:
    """Evaluation of one encoder by one evaluator, a deterministic function of the options."""
    torch.manual_seed(config.seed)
    return _PROBES[name][1](config)


def show(name: str, config: EvalConfig, scores: Sequence[Score], card: dict[str, Any]) -> None:
    """Print the table of scores, each with its 95% interval."""
    metrics = list(scores[0].metrics)
    header = ("features", "setting", *metrics, f"95% of {metrics[0]}")
    rows = [
        (
            s.features,
            s.setting,
            *(f"{s.metrics[m]:.2f}" for m in metrics),
            f"{s.interval[0]:.2f} to {s.interval[1]:.2f}",
        )
        for s in scores
    ]
    scored = card.get("val", card["train"])
    title = f"{name}: {config.encoder}, in %, {scored['images']:,} evaluation images"
    title += f" of {scored['groups']:,} groups" if "groups" in scored else ""
    title += f", {card['train']['images']:,} training images"
    if leaked := scored.get("groups_in_training"):
        title += f"; {leaked:,} OF THE GROUPS ARE IN TRAINING, TOO"
    show_table(title, rows, header=header)


def again(path: str) -> int:
    """Reproduction: evaluate again as a result's card says and compare; 0 if the scores are equal.

    Raises:
        UserError: the card cannot be used.
    """
    card = read_card(path)
    name = card["evaluator"]
    check(name in _PROBES, f"{path} is a card of {name!r}; again supports {', '.join(_PROBES)}")
    kind = _PROBES[name][0]
    flags = tree_flags(card["options"], known_keys(kind()), path)
    config = parse(kind(), flags, path, f"{_PROG} {name}")
    scores, now, _ = run(name, config)
    main_process = rank_and_world()[0] == 0
    if main_process:
        show(name, config, scores, now)
    check_same(path, card, now, scores)
    if main_process:
        print(f"the scores are the same as in {path}")
    return 0


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
    started = time.perf_counter()
    name = subcommand(argv, _PROG, "evaluator", [*_PROBES, *_OTHERS, "again"])
    if name in _OTHERS:
        return _OTHERS[name](argv[1:])
    if name == "again":
        check(len(argv) == 2, f"usage: {_PROG} again CARD.json")
        return again(argv[1])
    configs, flags = split_config(split_lists(argv[1:]))
    kind = _PROBES[name][0]
    files = [find_recipe(c) for c in configs]
    config = layered(kind(), files, flags, f"{_PROG} {name}", kind.__doc__ or "", kind)
    if os.environ.get("RANK", "0") == "0":
        check_place(config)
    scores, card, out = run(name, config)
    if rank_and_world()[0] == 0:
        show(name, config, scores, card)
        write_card(out, card, scores)
        print(f"protocol and scores: {out}")
    log.info("done in %s", duration(time.perf_counter() - started))
    return 0


if __name__ == "__main__":
    run_door(main)
