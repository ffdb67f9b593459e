"""Report page of one or several runs: HTML that needs nothing else, neither network nor files."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert
from markupsafe import Markup

from ssl_vit import __version__
from ssl_vit.common.duration import duration
from ssl_vit.evaluators.score import GIVEN, PIXELS
from ssl_vit.reporting.charts import COLOURS, MOST_POINTS, Points, curves, intervals
from ssl_vit.reporting.contents import part_of
from ssl_vit.reporting.explained import (
    Glossary,
    evaluator,
    neighbours_of,
    picture_meaning,
    picture_title,
)
from ssl_vit.reporting.story import KNN, Scored, Story, knn_names

_HERE = Path(__file__).parent
_PLAIN = "#8a8f98"


def render(stories: Sequence[Story], seed: int) -> str:
    """The page on these runs, side by side where they are several.

    ``seed`` is that of the maps. The same folders and seed give the same page, but for its date.
    """
    parts = [part_of(story, COLOURS[i % len(COLOURS)], seed) for i, story in enumerate(stories)]
    charts: dict[str, dict[str, Any]] = {}
    for i, part in enumerate(parts):
        for key in ("map", "confusion"):
            if part[key] and "chart" in part[key]:
                part[key]["id"] = f"{key}-{i}"
                charts[part[key]["id"]] = part[key].pop("chart")
    glossary = Glossary(story.run.method for story in stories)
    shown = [
        {"name": n, "title": glossary.title(n), "meaning": glossary.meaning(n)}
        for n in _curves(stories, charts, glossary)
    ]
    kinds = dict.fromkeys(kind for part in parts for kind in part["stages"])
    scores = _score_chart(stories)
    if scores:
        charts["scores"] = scores
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        runs=parts,
        names=" and ".join(part["name"] for part in parts),
        curves=shown,
        kinds=[
            {"name": kind, "title": picture_title(kind), "meaning": picture_meaning(kind)}
            for kind in kinds
        ],
        has_scores=bool(scores),
        equal=equal_images(stories),
        sized=_sized(stories),
        thinned=max((len(s.run.rows) for s in stories), default=0) > MOST_POINTS,
        options=_options(parts),
        charts=_script_json(charts),
        library=_library(),
        style=Markup((_HERE / "page.css").read_text()),
        script=Markup((_HERE / "page.js").read_text()),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=__version__,
    )


def _curves(
    stories: Sequence[Story], charts: dict[str, dict[str, Any]], glossary: Glossary
) -> list[str]:
    """Make the chart of every number that any run has logged; their names, in order."""
    plain = dict.fromkeys(name for story in stories for name in story.names)
    names = ["knn" if KNN.fullmatch(name) else name for name in plain]
    shown = glossary.ordered(list(dict.fromkeys(names)))
    several, over = len(stories) > 1, "images" if _sized(stories) else "step"
    for name in shown:
        series: dict[str, Points] = {}
        colours: dict[str, str] = {}
        for i, story in enumerate(stories):
            kinds = knn_names(story) if name == "knn" else {"": name}
            for j, (kind, key) in enumerate(kinds.items()):
                points = story.curve(key)
                if not points:
                    continue
                named = [story.name if several else "", kind]
                label = " ".join(filter(None, named)) or glossary.title(name)
                series[label] = points
                place = i + j * len(stories) if several else j
                colours[label] = COLOURS[place % len(COLOURS)]
        levels = _levels(stories) if name == "knn" else None
        charts[f"curve-{name}"] = curves(series, colours, levels, over)
    return shown


def _sized(stories: Sequence[Story]) -> bool:
    """True if all runs state the size of their batch, without which there are steps alone."""
    return all(story.run.images_per_step for story in stories)


def _levels(stories: Sequence[Story]) -> dict[str, float]:
    """k-NN of what an encoder must beat; by the run's name where runs differ in it."""
    found: dict[str, dict[str, float]] = {}
    for story in stories:
        for scored in story.scores:
            if scored.evaluator == "knn" and scored.of and not scored.own:
                found.setdefault(scored.of, {})[story.name] = scored.first
        start = _start(story)
        if start is not None:  # known from the first look on, and the same as in the closing scores
            found.setdefault(GIVEN, {}).setdefault(story.name, start)
    levels: dict[str, float] = {}
    for of, by_run in found.items():
        alike = len(set(by_run.values())) == 1
        levels |= {of if alike else f"{run}: {of}": value for run, value in by_run.items()}
    return levels


def _start(story: Story) -> float | None:
    """k-NN of the weights that a run began with, by the feature that is watched; None: of none."""
    own = story.run.knn
    points = story.run.series(own[0]) if own and story.run.config.get("init.encoder") else []
    return points[0][1] if points and points[0][0] == 0 else None


def _score_chart(stories: Sequence[Story]) -> dict[str, Any] | None:
    """The closing scores of all runs beside raw pixels and untrained encoders."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    colours: dict[str, str] = {}
    for i, story in enumerate(stories):
        for scored in (s for s in story.scores if s.of):
            low, high = scored.score.interval
            alike = _alike(scored, stories)
            of = scored.of if alike else f"{story.name}: {scored.of}"
            colour = COLOURS[i % len(COLOURS)]
            plain = _PLAIN if scored.of == PIXELS else f"{colour}88"
            colours[of] = colour if scored.own else plain
            what = evaluator(scored.evaluator)
            about = {"what": what, "of": of, "value": scored.first, "low": low, "high": high}
            rows[what, of] = about
    return intervals(list(rows.values()), colours) if rows else None


def _alike(scored: Scored, stories: Sequence[Story]) -> bool:
    """True if an entry is one and the same for all runs, or there is but one."""
    same = {(s.evaluator, s.first) for story in stories for s in story.scores if s.of == scored.of}
    several = len(stories) > 1
    return not several or (not scored.own and len(same) == len({e for e, _ in same}))


def equal_images(stories: Sequence[Story]) -> dict[str, Any] | None:
    """k-NN of several runs after equally many images: at each run's last look before that.

    None for one run, and where fewer than two have looked.
    """
    looked = [
        (story, story.run.images_per_step, story.run.series(story.run.knn[0]))
        for story in stories
        if story.run.knn and story.run.images_per_step
    ]
    if len(looked) < 2:
        return None
    common = min(points[-1][0] * size for _, size, points in looked)
    rows = []
    for story, size, points in looked:
        before = [point for point in points if point[0] * size <= common]
        if not before:
            continue
        step, value = before[-1]
        assert story.run.knn is not None
        rows.append(
            {
                "name": story.name,
                "feature": neighbours_of(story.run.knn[0]),
                "images": f"{step * size:,}",
                "time": duration(3600 * float(story.hours(step))),
                "value": f"{value:.1f}",
            }
        )
    return {"images": f"{common:,}", "rows": rows} if len(rows) > 1 else None


def _options(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All options, a row each; those that differ, from a default or between runs, first."""
    names = dict.fromkeys(row["name"] for part in parts for row in part["options"])
    by_name = [{row["name"]: row for row in part["options"]} for part in parts]
    rows = []
    for name in names:
        cells = [by.get(name) for by in by_name]
        values = {cell["value"] if cell else None for cell in cells}
        changed = len(values) > 1 or any(cell and cell["differs"] for cell in cells)
        rows.append({"name": name, "cells": cells, "changed": changed})
    return sorted(rows, key=lambda row: not row["changed"])


@functools.cache
def _library() -> Markup:
    """Vega, Vega-Lite and vega-embed, as one script."""
    release = ".".join(alt.SCHEMA_VERSION.split(".")[:2])  # the one that the charts are made for
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed", vl_version=release)
    return Markup(bundle.replace("</script", "<\\/script"))


def _script_json(content: Any) -> Markup:
    """JSON that can stand inside a script element, whatever text is in it."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Markup(
        text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )
