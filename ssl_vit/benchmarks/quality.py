"""Quality per minute: the length of a run fitted to a time budget, and the table of such runs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

import numpy as np

from ssl_vit.benchmarks.speed_tables import markdown_rows

Row = dict[str, Any]
# Evaluators that judge, and their headings in the table.
JUDGES = {"knn": "k-NN k=20", "linear": "linear"}
# Measurement of a rate: steps that do not count; its share of the budget, and the bounds of that in
# seconds.
WARM_UP, _SHARE, _LEAST, _MOST = 20, 0.05, 2.0, 60.0
HEADER = ("method", "recipe", "images/s", "images seen", "minutes", *JUDGES.values())
_NOTES = """
Judged is the exported encoder, with all images of `{train}` for training and `{val}` for the score;
settings are chosen on training images. ±: half of the 95 % interval over the images; sd: standard
deviation over seeds. Minutes are of training: start-up, saving, probes and judging are not counted.
"""


def intervals(rows: list[Row], batch_size: int) -> list[tuple[int, int, float]]:
    """(first step, last step, seconds) of each metrics row with a rate, oldest first.

    Rates leave out saving and probing (``RunLog.pause``).
    """
    rated = [row for row in rows if (row.get("images_per_s") or 0) > 0]
    spans = zip(pairwise([0, *(row["step"] for row in rated)]), rated, strict=True)
    return [
        (first, last, (last - first) * batch_size / row["images_per_s"])
        for (first, last), row in spans
    ]


def rate_after(rows: list[Row], batch_size: int, warm_up: int) -> tuple[float, float] | None:
    """Images per second of the rows that begin at step ``warm_up`` or later, and their seconds.

    None: there is none yet. Before that, workers start, blocks are compiled, and steps take batches
    that were prepared while no step was.
    """
    spans = [span for span in intervals(rows, batch_size) if span[0] >= warm_up]
    steps, seconds = (sum(last - first for first, last, _ in spans), sum(s for *_, s in spans))
    return (steps * batch_size / seconds, seconds) if spans else None


def seconds_of_rate(minutes: float) -> float:
    """Seconds for which the rate of a training of so many minutes is measured."""
    return min(_MOST, max(_LEAST, 60 * _SHARE * minutes))


def fitted_steps(images_per_second: float, batch_size: int, minutes: float) -> int:
    """Optimizer steps that take so many minutes at this rate; one at the least."""
    return max(1, round(images_per_second * 60 * minutes / batch_size))


def minutes_at(rows: list[Row], batch_size: int) -> list[tuple[int, float]]:
    """(step, minutes of training so far) at the start and at each metrics row with a rate.

    The first row includes the start of workers and compilation: its steps are taken to last as long
    as those of the second. Of a run that was stopped, the later starts are counted.
    """
    spans = intervals(rows, batch_size)
    if len(spans) > 1:
        (first, last, _), (start, end, seconds) = spans[:2]
        spans[0] = (first, last, seconds / (end - start) * (last - first))
    passed = np.cumsum([0.0, *(seconds / 60 for *_, seconds in spans)]).tolist()
    return list(zip([0, *(last for _, last, _ in spans)], passed, strict=True))


def curve(
    rows: list[Row], feature: str, minutes: list[tuple[int, float]]
) -> list[tuple[float, float]]:
    """(minutes, k-NN in percent) of each probe of the encoder by this feature."""
    steps, passed = zip(*minutes, strict=True)
    found = ((row["step"], k, v) for row in rows for k, v in row.items())
    probed = [(s, v) for s, k, v in found if k.startswith("knn") and k.endswith(f"_{feature}")]
    return [(float(np.interp(step, steps, passed)), value) for step, value in probed]


def by_recipe(report: Row) -> dict[str, list[Row]]:
    """Judged runs of a report by recipe, one for each seed."""
    found: dict[str, list[Row]] = {}
    for run in report["runs"].values():
        if "scores" in run:
            found.setdefault(run["recipe"], []).append(run)
    return found


def table(report: Row) -> Iterator[tuple[str, ...]]:
    """Rows of the table, as ``HEADER``: one for each recipe, then the baselines."""
    for recipe, runs in by_recipe(report).items():
        seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
        keys = ("images_per_second", "images_seen", "minutes")
        rate, seen, minutes = (mean(run[key] for run in runs) for key in keys)
        numbers = (f"{rate:,.0f}", f"{seen:,.0f}", f"{minutes:.3g}")
        yield (runs[0]["method"], recipe + seeds, *numbers, *_cells(runs))
    for name, row in report["baselines"].items():
        yield (name, "", "", "", "", *_cells([row]))


def _cells(runs: list[Row]) -> list[str]:
    """Cell of each evaluator: mean over seeds of the score and half its interval, and spread."""
    cells = []
    for judge in JUDGES:
        scores = [run["scores"][judge] for run in runs]
        values = [score["value"] for score in scores]
        half = mean((high - low) / 2 for low, high in (score["interval"] for score in scores))
        spread = f", sd {stdev(values):.1f}" if len(runs) > 1 else ""
        cells.append(f"{mean(values):.1f} ±{half:.1f}{spread}")
    return cells


def markdown(report: Row) -> str:
    """Markdown of a report: the table, with machine, date and protocol."""
    asked = report["asked"]
    source = f", commit {report['commit'][:12]}" if report["commit"] else ""
    made = f"{report['date'][:10]}, {asked['machine']}, torch {report['versions']['torch']}{source}"
    rows = [HEADER, ("---",) * 2 + ("---:",) * (len(HEADER) - 2), *table(report)]
    lines = markdown_rows(rows)
    notes = _NOTES.format(train=asked["train"], val=asked["val"])
    return f"{asked['minutes']:g} minutes of training each; {made}.\n\n{lines}\n{notes}"
