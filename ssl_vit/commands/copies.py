"""Copies command: from options to the share of copies, and a report of them: CSV and picture."""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ssl_vit.commands.evaluating import Evaluation
from ssl_vit.commands.probes import Result
from ssl_vit.commands.retrieval_options import CopiesConfig
from ssl_vit.common.figures import save_png
from ssl_vit.common.files import write_text_atomically
from ssl_vit.data.sources import Source
from ssl_vit.data.view import View
from ssl_vit.evaluators.copies import (
    SMALL,
    Pair,
    copied,
    find_copies,
    in_all_turns,
    turns_of,
    with_small,
)
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.intervals import accuracy_interval
from ssl_vit.evaluators.options import parts_of
from ssl_vit.evaluators.score import Score
from ssl_vit.pictures.couples import couples_panel
from ssl_vit.pictures.thumbnails import thumbnails

log = logging.getLogger("ssl_vit")
_SHOWN, _PIXELS = 24, 128
_MANY = 0.2


def copies(config: CopiesConfig) -> Result:
    """Share of validation images that have a copy in training or, without any, of training images
    that have one among the others; the report is written beside it."""
    by = Evaluation(config, needs_val=False, plain=True, labelled=False)
    train, one = by.sources["train"], "val" not in by.sources
    val = train if one else by.sources["val"]
    bank, asked = _features(by)
    options = (by.names, by.backbone.view.size, config.least, config.candidates, by.device)
    pairs = find_copies((train, val), (bank, asked), *options)
    any_copy, same = copied(pairs, asked, one)
    card, out = by.card("copies"), by.out("copies-within" if one else "copies")
    where = ("train", "copies_within") if one else ("val", "copies_in_training")
    card[where[0]][where[1]] = int(any_copy.sum())
    if (likely := float((any_copy & ~same).mean())) > _MANY:
        log.warning(
            "warning: %.0f %% of the images have copies that are other files; if pairs of %s are "
            "no copies, these images are too plain for --least %g: raise it",
            *(100 * likely, out.with_suffix(".png"), config.least),
        )
    groups = None if asked.groups is None else asked.groups.numpy()
    score = Score(
        features="+".join(by.names),
        setting=f"correlation >= {config.least:g}",
        metrics={"copied": 100.0 * float(any_copy.mean()), "identical": 100.0 * float(same.mean())},
        interval=accuracy_interval(any_copy, config.seed, groups),
        per_class={},
        confusion=None,
        details={
            "better": "lower",
            "pairs": len(pairs),
            "orientations": dict(Counter(pair.turn or "as it is" for pair in pairs)),
        },
    )
    report = partial(write_report, out, pairs, train, val, by.backbone.view)
    return [score], card, out, {"copies": report}


def _features(by: Evaluation) -> tuple[FeatureSet, FeatureSet]:
    """Features and small pictures of training images, and of validation images, or else of the
    training images, in each orientation."""
    parts, turns = parts_of(by.names), turns_of(by.backbone.view.size)
    embed, split = by.backbone.embed(parts), "val" if "val" in by.sources else "train"
    names = (*(f"{part}@{turn}" for part in parts for turn in turns), SMALL)
    turning = in_all_turns(embed, turns)
    asked = by.embedded(turning, names, by.sources[split], by.content(split))
    by.read(split, asked)
    if split == "train":
        upright = {name: asked.parts[f"{name}@0"] for name in parts}
        return replace(asked, parts=upright | {SMALL: asked.parts[SMALL]}), asked
    bank = by.embedded(with_small(embed), (*parts, SMALL), by.sources["train"], by.content("train"))
    by.read("train", bank)
    return bank, asked


def write_report(
    out: Path, pairs: Sequence[Pair], train: Source, val: Source, view: View
) -> list[Path]:
    """Write all pairs as CSV and, if there are any, a picture of the first ones, as ``out`` with
    other endings; returns the paths."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    ends = ("image", "copy") if train is val else ("val", "train")
    rows.writerow((*ends, "identical", "correlation", "cosine", "orientation"))
    for pair in pairs:
        names, numbers = (
            (val.name(pair.val), train.name(pair.train)),
            (pair.correlation, pair.cosine),
        )
        shown = ("" if n != n else f"{n:.4f}" for n in numbers)
        rows.writerow((*names, int(pair.identical), *shown, pair.turn))
    paths = [out.with_suffix(".csv")]
    write_text_atomically(paths[0], text.getvalue())
    if pairs:
        paths.append(out.with_suffix(".png"))
        save_png(paths[1], _picture(pairs, train, val, view))
    return paths


def _picture(pairs: Sequence[Pair], train: Source, val: Source, view: View) -> np.ndarray:
    """Couples panel of some pairs."""
    some = spread(pairs)
    ours = thumbnails(val, [pair.val for pair in some], view, _PIXELS)
    theirs = thumbnails(train, [pair.train for pair in some], view, _PIXELS)
    said = ["identical" if p.identical else f"{p.correlation:.3f} {p.turn}".strip() for p in some]
    both = f"Both of each: of {train.spec}."
    apart = f"Left of each: of {val.spec}; right: of {train.spec}."
    about = (
        f"{both if train is val else apart} {len(some)} of {len(pairs):,} "
        "pairs, evenly spread from the most to the least similar. Below: the correlation of "
        "their edges, and how the left one is turned to be the right one."
    )
    return couples_panel(ours, theirs, said, about)


def spread(pairs: Sequence[Pair]) -> list[Pair]:
    """Sample of at most 24 pairs, evenly spread over all of them, the last included: where copies
    end, one sees best whether the threshold is right."""
    n = len(pairs)
    if n <= _SHOWN:
        return list(pairs)
    return [pairs[i * (n - 1) // (_SHOWN - 1)] for i in range(_SHOWN)]
