"""Interactive charts, as Vega-Lite specifications made with Altair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

# Bright enough for a dark page, dark enough for a light one; distinct to most colour-blind eyes.
COLOURS = ("#3b82f6", "#f07f13", "#12a37a", "#c44fc4", "#e0484d", "#8a8f98", "#b39700", "#6d5ae6")
# More points than this a curve are averaged in groups.
MOST_POINTS = 600
_INK = "currentColor"  # the page's own, light or dark
# Hours are mostly parts of one, of which "s" would make thousandths.
_AT = "xaxis == 'hours' ? format(datum.value, '.3~r') : format(datum.value, '.4~s')"
_ZOOM = "wheel![event.shiftKey]"
_PAN = "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!"
_TOOLTIP = [
    alt.Tooltip("series:N", title="what"),
    alt.Tooltip("value:Q", format=".5~g"),
    alt.Tooltip("step:Q", format=","),
    alt.Tooltip("images:Q", format=","),
    alt.Tooltip("hours:Q", format=".3~f"),
]
Points = list[dict[str, Any]]


def thinned(points: Points) -> Points:
    """Points, at most ``MOST_POINTS``: means of equal groups of neighbours, each at its last
    step."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [g[-1] | {"value": float(np.mean([p["value"] for p in g]))} for g in groups]


def curves(
    series: dict[str, Points],
    colours: dict[str, str],
    levels: dict[str, float] | None = None,
    over: str = "images",
) -> dict[str, Any]:
    """Lines by name over images, steps or hours: a page's ``xaxis`` parameter selects which.

    The point nearest to the pointer has a tooltip; with the shift key the wheel zooms and dragging
    moves.

    Args:
        series: by name, points with ``images``, ``step``, ``hours`` and ``value``.
        colours: of each name.
        levels: named horizontal lines to compare with.
        over: what ``xaxis`` is at first.
    """
    rows = [{"series": name, **p} for name, points in series.items() for p in thinned(points)]
    axis = alt.param(name="xaxis", value=over)
    scale = alt.Scale(domain=list(series), range=[colours[name] for name in series])
    legend = alt.Legend(title=None, orient="top") if len(series) > 1 else None
    zoom = alt.selection_interval(bind="scales", encodings=["x"], zoom=_ZOOM, translate=_PAN)
    near = alt.selection_point(
        nearest=True, on="pointerover", fields=["at"], empty=False, clear="pointerout"
    )
    base = (
        alt.Chart(alt.InlineData(values=rows))
        .transform_calculate(at="datum[xaxis]")
        .encode(
            x=alt.X("at:Q", axis=_axis(labelExpr=_AT), scale=alt.Scale(nice=False)),
            y=alt.Y(
                "value:Q",
                axis=_axis(),
                scale=alt.Scale(zero=False, padding=8),
            ),
            color=alt.Color("series:N", scale=scale, legend=legend),
        )
    )
    shown = base.mark_point(filled=True, size=60).encode(
        opacity=alt.when(near).then(alt.value(1)).otherwise(alt.value(0)),
        tooltip=_TOOLTIP[: 5 if over == "images" else 3],
    )
    # A line of one point would not be seen.
    marks = alt.OverlayMarkDef(filled=True, size=30) if len(rows) <= 40 * len(series) else False
    lines = base.mark_line(strokeWidth=1.7, point=marks, clip=True).add_params(axis, zoom)
    layers: list[Any] = [lines, shown.add_params(near)]
    return _spec(alt.layer(*_levels(levels or {}), *layers), 190)


def _levels(levels: dict[str, float]) -> list[Any]:
    """Dashed lines across a chart, each with its name at the left."""
    made: list[Any] = []
    for name, value in levels.items():
        data = alt.InlineData(values=[{"level": value, "name": f"{name} {value:.1f}"}])
        line = alt.Chart(data).mark_rule(strokeDash=[4, 3], color=_INK, opacity=0.55)
        text = alt.Chart(data).mark_text(align="left", dx=4, dy=-6, color=_INK, opacity=0.8)
        made.append(line.encode(y="level:Q"))
        made.append(text.encode(y="level:Q", x=alt.value(0), text="name:N"))
    return made


def landscape(points: Points, labelled: bool, coloured: bool) -> dict[str, Any]:
    """A map of images: points with ``x``, ``y``, ``label`` and ``image``, shown on hover.

    A class, clicked in the legend (or, of more than 30, at one of its images), stands out.

    Args:
        labelled: whether points have labels; ``coloured``: whether these are classes.
    """
    base = alt.Chart(alt.InlineData(values=points)).mark_circle(size=55)
    plain: Any = alt.Axis(labels=False, ticks=False, domain=False, grid=False, title=None)
    tooltip = [alt.Tooltip("image:N")] + ([alt.Tooltip("label:N")] if labelled else [])
    chart = base.encode(
        x=alt.X("x:Q", axis=plain, scale=alt.Scale(zero=False)),
        y=alt.Y("y:Q", axis=plain, scale=alt.Scale(zero=False)),
        tooltip=tooltip,
    )
    classes = sorted({p["label"] for p in points}) if coloured else []
    few = len(classes) <= 30
    chosen = alt.selection_point(fields=["label"], **({"bind": "legend"} if few else {}))
    if classes:
        legend = (
            alt.Legend(title=None, orient="bottom", columns=5, symbolOpacity=1) if few else None
        )
        scheme: Any = "tableau10" if len(classes) <= 10 else "tableau20"
        chart = chart.encode(
            color=alt.Color(
                "label:N", scale=alt.Scale(domain=classes, scheme=scheme), legend=legend
            ),
            opacity=alt.when(chosen).then(alt.value(0.85)).otherwise(alt.value(0.06)),
        ).add_params(chosen)
    else:
        chart = chart.encode(color=alt.value(COLOURS[0]), opacity=alt.value(0.7))
    return _spec(chart, 460)


def intervals(rows: Points, colours: dict[str, str], unit: str = "%") -> dict[str, Any]:
    """Scores with 95 % intervals: rows with ``what``, ``of``, ``value``, ``low``, ``high``."""
    order = list(dict.fromkeys(row["what"] for row in rows))
    names = list(dict.fromkeys(row["of"] for row in rows))
    scale = alt.Scale(domain=names, range=[colours[name] for name in names])
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        y=alt.Y("what:N", sort=order, axis=_axis(False, labelLimit=260)),
        yOffset=alt.YOffset("of:N", sort=names),
        color=alt.Color("of:N", scale=scale, legend=alt.Legend(title=None, orient="top")),
        tooltip=[
            alt.Tooltip("what:N"),
            alt.Tooltip("of:N"),
            alt.Tooltip("value:Q", format=".2f", title=unit),
            alt.Tooltip("low:Q", format=".2f", title="95 % from"),
            alt.Tooltip("high:Q", format=".2f", title="to"),
        ],
    )
    x = alt.X("low:Q", axis=_axis(), scale=alt.Scale(zero=False, padding=12))
    spans = base.mark_rule(strokeWidth=2).encode(x=x, x2="high:Q")
    dots = base.mark_point(filled=True, size=70).encode(x="value:Q")
    return _spec(alt.layer(spans, dots), len(order) * (14 * len(names) + 12))


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> dict[str, Any]:
    """Confusion matrix: a row's images in shares of the row."""
    rows = [
        {
            "truth": truth,
            "guess": guess,
            "images": int(n),
            "share": n / max(1, sum(row)),
        }
        for truth, row in zip(classes, counts, strict=True)
        for guess, n in zip(classes, row, strict=True)
    ]
    order = list(classes)
    base = alt.Chart(alt.InlineData(values=rows)).mark_rect()
    chart = base.encode(
        x=alt.X("guess:N", sort=order, axis=_axis(False, labelAngle=-45), title="guess"),
        y=alt.Y("truth:N", sort=order, axis=_axis(False), title="truth"),
        color=alt.Color(
            "share:Q",
            scale=alt.Scale(scheme="viridis", domain=[0, 1]),
            legend=alt.Legend(title=None, format="%", orient="top"),
        ),
        tooltip=["truth:N", "guess:N", alt.Tooltip("share:Q", format=".1%"), "images:Q"],
    )
    return _spec(chart, 340)


def _axis(grid: bool = True, **more: Any) -> Any:
    return alt.Axis(title=None, tickCount=5, grid=grid, **more)


def _spec(chart: Any, height: int) -> dict[str, Any]:
    """A chart in the page's own colours and font, as wide as its place."""
    made = chart.properties(
        width="container",
        height=height,
        background="transparent",
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
    ).configure(font="system-ui, sans-serif")
    made = made.configure_axis(
        labelColor=_INK,
        titleColor=_INK,
        tickColor=_INK,
        domainColor=_INK,
        gridColor=_INK,
        gridOpacity=0.12,
        domainOpacity=0.4,
        tickOpacity=0.4,
        labelFontSize=11,
    )
    made = made.configure_legend(labelColor=_INK, titleColor=_INK, labelFontSize=12, labelLimit=220)
    made = made.configure_view(stroke=None)
    found: dict[str, Any] = made.to_dict()
    return found
