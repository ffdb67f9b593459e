"""The evaluation door: ``python -m ssl_vit.evaluate linear --encoder RUN_OR_FILE ...``."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ssl_vit import compare, finetune
from ssl_vit.cli import find_recipe, layered, run_door, show_table, split_config, subcommand
from ssl_vit.config import RunFailed, UserError, check
from ssl_vit.distributed import rank_and_world
from ssl_vit.evaluation import EvalConfig
from ssl_vit.evaluators.protocol import write_card
from ssl_vit.evaluators.scores import Score
from ssl_vit.options import known_keys, parse, tree_flags
from ssl_vit.probes import (
    KnnConfig,
    LinearConfig,
    Result,
    SegmentConfig,
    knn,
    linear,
    segment,
)
from ssl_vit.training.metrics import duration

log = logging.getLogger("ssl_vit")
_PROG = "python -m ssl_vit.evaluate"
_PROBES: dict[str, tuple[type[EvalConfig], Callable[[Any], Result]]] = {
    "knn": (KnnConfig, knn),
    "linear": (LinearConfig, linear),
    "segment": (SegmentConfig, segment),
}
_IDENTITIES = (
    ("encoder", "weights_sha256"),
    ("train", "content_sha256"),
    ("train", "masks_sha256"),
    ("val", "content_sha256"),
    ("val", "masks_sha256"),
)
_OTHERS = {"finetune": finetune.main, "compare": compare.main}


def run(name: str, config: EvalConfig) -> Result:
    """One evaluator on one encoder; deterministic for the options."""
    torch.manual_seed(config.seed)
    return _PROBES[name][1](config)


def show(name: str, config: EvalConfig, scores: Sequence[Score], card: dict[str, Any]) -> None:
    """The table of scores, each with its 95% interval."""
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
    judged = card.get("val", card["train"])["images"]
    title = f"{name}: {config.encoder}, {judged:,} images judged"
    title += f", {card['train']['images']:,} to learn from, in %"
    show_table(title, rows, header=header)


def again(path: str) -> int:
    """Do what a result's card says once more, and compare; 0 if the numbers are the same."""
    file = Path(path).expanduser()
    try:
        card = json.loads(file.read_text())
        name, options, before = card["evaluator"], card["options"], card["scores"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path!r} is no result of {_PROG}: a JSON file with its card") from None
    check(name in _PROBES, f"{path} is of {name!r}; again does {', '.join(_PROBES)}")
    kind = _PROBES[name][0]
    options.pop("config", None)
    flags = tree_flags(options, known_keys(kind()), path)
    config = parse(kind(), flags, path, f"{_PROG} {name}")
    scores, now, _ = run(name, config)
    show(name, config, scores, now)
    for part, key in _IDENTITIES:
        old, new = (made.get(part, {}).get(key) for made in (card, now))
        if old != new:
            raise RunFailed(f"{part} {key} was {old} in {path}, and is {new} now")
    pairs = [(b["metrics"], s.metrics) for b, s in zip(before, scores, strict=True)]
    different = [f"{old} then, {new} now" for old, new in pairs if old != new]
    if different:
        raise RunFailed(f"{path}: the numbers differ: {'; '.join(different[:3])}")
    print(f"the same numbers as in {path}")
    return 0


def split_lists(flags: Sequence[str]) -> list[str]:
    """``1,2,5`` written as one argument means three numbers."""
    lists = re.compile(r"\d+(\.\d+)?(,\d+(\.\d+)?)+")
    return [n for f in flags for n in (f.split(",") if lists.fullmatch(f) else [f])]


def main(argv: list[str]) -> int:
    """The door; returns the exit status."""
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
    scores, card, out = run(name, config)
    if rank_and_world()[0] == 0:
        show(name, config, scores, card)
        write_card(out, card, scores)
        print(f"protocol and scores: {out}")
    log.info("done in %s", duration(time.perf_counter() - started))
    return 0


if __name__ == "__main__":
    run_door(main)
