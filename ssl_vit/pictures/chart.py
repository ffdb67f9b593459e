"""Score chart: horizontal bars with intervals."""

from __future__ import annotations

from pathlib import Path

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
