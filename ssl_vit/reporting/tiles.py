"""Tiles: the numbers in the head of a report."""

from __future__ import annotations

from statistics import median

from ssl_vit.common.duration import duration
from ssl_vit.reporting.explained import evaluator, neighbours_of
from ssl_vit.reporting.story import TUNED, Story

_NOTHING = "-"
# Scores on held-out images at a look of a run that is tuned: name, label, and what it is.
_LOOKED = (
    ("val_map", "held-out precision", "mean average"),
    ("val_top1", "held-out accuracy", "top-1"),
    ("val_ap", "held-out AP", "of boxes, IoU 0.50 to 0.95"),
    ("val_miou", "held-out mIoU", "mean over classes"),
    ("val_delta1", "held-out delta1", "share of pixels"),
)


def tiles(story: Story) -> list[dict[str, str]]:
    """The numbers that people ask for first, each with a note."""
    run, status = story.run, story.run.status
    images = _NOTHING if story.images is None else f"{story.images:,}"
    time = duration(float(story.seconds[-1])) if len(story.steps) else _NOTHING
    rates = [value for _, value in run.series("images_per_s")]
    found = [
        _quality_tile(story),
        _probe_tile(story),
        _tile("images seen", images, _epochs(story)),
        _tile("time", time, _where(story)),
        _tile("images/s", f"{median(rates):,.0f}" if rates else _NOTHING, "median of all lines"),
        _energy_tile(story),
    ]
    if status and status.job:
        found.append(_tile("job", status.job, "Slurm"))
    return found


def _quality_tile(story: Story) -> dict[str, str]:
    """Score on held-out images while training."""
    knn = story.run.knn
    for name, label, what in _LOOKED:
        value = story.run.latest(name)
        if value is not None:
            return _tile(label, f"{value:.1f} %", f"{what}, at the last look")
    if story.run.method in TUNED:
        return _tile("held-out score", _NOTHING, "not yet measured")
    if knn is None:
        return _tile("k-NN", _NOTHING, "no labels, or not yet measured")
    return _tile("k-NN", f"{knn[1]:.1f} %", neighbours_of(knn[0]))


def _energy_tile(story: Story) -> dict[str, str]:
    """Energy tile, of the lines that have it, as no other is known."""
    steps = {step for step, _ in story.run.series("energy_j")}
    joules, size, done, images = story.total("energy_j"), story.run.images_per_step, 0, 0
    if joules is None:
        return _tile("energy", _NOTHING, "not measured")
    for step, _ in story.run.series("images_per_s"):
        images += (step - done) * (size or 0) if step in steps else 0
        done = step
    each = f"{joules / images:.3g} J an image" if images else "of an unknown number of images"
    part = images / story.images if story.images else 1.0
    note = f"{each}, measured for {100 * part:.0f} %" if part < 0.99 else each
    return _tile("energy", f"{joules / 3.6e6:.3g} kWh", note)


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _probe_tile(story: Story) -> dict[str, str]:
    """The closing score of what was learnt; without one, that of the run's own linear.json."""
    own = [s for s in story.scores if s.own and s.evaluator in ("linear", *TUNED)]
    beside = story.run.method not in TUNED  # a training from scratch, to compare with
    closing = [s for s in own if s.of or (s.evaluator in TUNED and not (beside and s.scratch))]
    found = closing or [s for s in own if s.file.name == "linear.json"]
    if not found and story.run.method in TUNED:
        return _tile(evaluator(story.run.method), _NOTHING, "measured at the end")
    if not found:
        return _tile("linear probe", _NOTHING, "not measured")
    scored = found[0]
    low, high = scored.score.interval
    name = next(iter(scored.score.metrics))
    if scored.evaluator == "detect":
        name = f"{name.upper()} of {scored.score.features}"
    note = f"{name}; 95 %: {low:.1f} to {high:.1f}"
    return _tile(evaluator(scored.evaluator), f"{scored.first:.1f} %", note)


def _epochs(story: Story) -> str:
    per = story.run.steps_per_epoch
    return f"{story.run.step / per:.3g} epochs" if per else "epochs unknown"


def _where(story: Story) -> str:
    status = story.run.status
    if not status:
        return "saving and probing included"
    processes = f"{status.processes} processes x " if status.processes > 1 else ""
    threads = f"{status.threads} threads" if status.threads > 1 else "1 thread"
    return f"{status.device}, {processes}{threads}"
