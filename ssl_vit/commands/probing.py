"""Evaluation of one encoder by one evaluator, and its repetition by a card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ssl_vit.commands.attentive import attentive
from ssl_vit.commands.cli import show_table
from ssl_vit.commands.copies import copies
from ssl_vit.commands.dense_probes import depth, segment
from ssl_vit.commands.eval_options import EvalConfig
from ssl_vit.commands.probe_options import PROBES
from ssl_vit.commands.probes import Result, knn, linear
from ssl_vit.commands.retrieval import retrieval
from ssl_vit.common.distributed import rank_and_world
from ssl_vit.common.errors import check
from ssl_vit.common.figures import save_png
from ssl_vit.common.layers import known_keys, parse, tree_flags
from ssl_vit.evaluators.protocol import check_same, read_card, write_card
from ssl_vit.evaluators.score import UNITS, Score

_PROG = "python -m ssl_vit.evaluate"
_RUN: dict[str, Callable[[Any], Result]] = {
    "knn": knn,
    "linear": linear,
    "attentive": attentive,
    "retrieval": retrieval,
    "copies": copies,
    "segment": segment,
    "depth": depth,
}


def run(name: str, config: EvalConfig) -> Result:
    """Evaluation of one encoder by one evaluator, a deterministic function of the options."""
    torch.manual_seed(config.seed)
    return _RUN[name](config)


def show(name: str, config: EvalConfig, scores: Sequence[Score], card: dict[str, Any]) -> None:
    """Print the table of scores, each with its 95% interval."""
    metrics = list(scores[0].metrics)
    header = ("features", "setting", *metrics, f"95% of {metrics[0]}")
    rows = [
        (
            s.features,
            s.setting,
            *(f"{s.metrics[m]:.{4 if m in UNITS else 2}f}" for m in metrics),
            f"{s.interval[0]:.2f} to {s.interval[1]:.2f}",
        )
        for s in scores
    ]
    scored = card.get("val", card["train"])
    units = "".join(f" ({m}: {UNITS[m]})" for m in metrics if m in UNITS)
    title = f"{name}: {config.encoder}, in %{units}, {scored['images']:,} evaluation images"
    title += f" of {scored['groups']:,} groups" if "groups" in scored else ""
    title += f", {card['train']['images']:,} training images"
    if leaked := scored.get("groups_in_training"):
        title += f"; {leaked:,} OF THE GROUPS ARE IN TRAINING, TOO"
    if copied := scored.get("copies_in_training"):
        title += f"; {copied:,} OF THE IMAGES HAVE COPIES IN TRAINING"
    elif copied := scored.get("copies_within"):
        title += f"; {copied:,} OF THE IMAGES HAVE COPIES AMONG THE OTHERS"
    elif same := scored.get("identical_in_training"):
        title += f"; {same:,} OF THE IMAGES ARE IN TRAINING, TOO"
    show_table(title, rows, header=header)


def again(path: str, more: Sequence[str] = ()) -> int:
    """Reproduction: evaluate again as a result's card says and compare; 0 if the scores are equal.

    Args:
        more: options of the score of a network that was kept (``rescoring``).

    Raises:
        UserError: the card cannot be used.
    """
    from ssl_vit.commands.rescoring import TUNED, again_tuned  # what trains, which others do not

    card = read_card(path)
    name = card["evaluator"]
    if name in TUNED:
        return again_tuned(path, card, more)
    known = ", ".join((*PROBES, *TUNED))
    check(name in PROBES, f"{path} is a card of {name!r}; again supports {known}")
    kept = f"options are for cards of {' and '.join(TUNED)}, whose network is kept"
    check(not more, f"{path} is a card of {name!r}; {kept}: run {_PROG} {name}")
    kind = PROBES[name]
    flags = tree_flags(card["options"], known_keys(kind()), path)
    config = parse(kind(), flags, path, f"{_PROG} {name}")
    scores, now, *_ = run(name, config)
    main_process = rank_and_world()[0] == 0
    if main_process:
        show(name, config, scores, now)
    check_same(path, card, now, scores)
    if main_process:
        print(f"the scores are the same as in {path}")
    return 0


def evaluate(name: str, config: EvalConfig) -> None:
    """Evaluate, print the scores, and write them with their card."""
    scores, card, out, *rest = run(name, config)
    if rank_and_world()[0] == 0:
        show(name, config, scores, card)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_card(out, card, scores)
        print(f"protocol and scores: {out}")
        for made in rest:
            for kind, found in made.items():
                if callable(found):
                    paths = list(found())
                else:
                    paths = [out.with_name(f"{out.stem}-{kind}.png")]
                    save_png(paths[0], found)
                print(f"{kind}: {', '.join(map(str, paths))}")
