"""Score charts: horizontal bars with intervals, and curves of a score over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

Bars = dict[str, dict[str, tuple[float, float, float]]]
"""Scores by encoder, by evaluator: a score, and the ends of its interval."""


def bars(path: Path, values: Bars, axis: str) -> None:
    """Draw a group of horizontal bars for each encoder, with intervals, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    evaluators = list(dict.fromkeys(e for row in values.values() for e in row))
    thick = 0.8 / max(1, len(evaluators))
    figure = Figure(figsize=(8, 0.8 + 0.26 * len(values) * (len(evaluators) + 1)), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for j, evaluator in enumerate(evaluators):
        rows = [(i, row[evaluator]) for i, row in enumerate(values.values()) if evaluator in row]
        places = [i + (j - (len(evaluators) - 1) / 2) * thick for i, _ in rows]
        scores = [score for _, (score, _, _) in rows]
        errors = [
            [score - low for _, (score, low, _) in rows],
            [high - score for _, (score, _, high) in rows],
        ]
        drawn = axes.barh(places, scores, thick * 0.9, xerr=errors, label=evaluator, capsize=2)
        axes.bar_label(drawn, fmt="%.1f", padding=4, fontsize=7)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()  # the first encoder on top, as in the table
    axes.set_xlabel(axis)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(evaluators), frameon=False)
    figure.savefig(path, format="png", bbox_inches="tight")


class Curve(NamedTuple):
    """Curve: points (x, y), and its end (x, y, low, high), a score with its interval. Curves of one
    label have one colour."""

    label: str
    points: Sequence[tuple[float, float]]
    end: tuple[float, float, float, float]


def curves(path: Path, drawn: Sequence[Curve], x_axis: str, y_axis: str) -> None:
    """Draw curves, each with its end as a point with an interval, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(curve.label for curve in drawn))
    figure = Figure(figsize=(8, 5), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    named: set[str] = set()
    for label, points, (x, y, low, high) in drawn:
        colour = f"C{labels.index(label) % 10}"
        axes.plot([p[0] for p in points], [p[1] for p in points], ".-", color=colour, linewidth=1)
        shown = None if label in named else label
        errors = [[y - low], [high - y]]
        axes.errorbar([x], [y], errors, fmt="o", color=colour, capsize=3, label=shown)
        named.add(label)
    axes.set_xlabel(x_axis)
    axes.set_ylabel(y_axis)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    figure.savefig(path, format="png", bbox_inches="tight")
