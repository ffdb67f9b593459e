"""Advice: problems of a run, found in what it logged, each with its remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from ssl_vit.evaluators.score import GIVEN
from ssl_vit.reporting.explained import evaluator, method_scalars
from ssl_vit.reporting.story import Story

# Thresholds; each is named in the line that it leads to.
_WAITING, _SLOW = 0.2, 1.5
_PAUSES = (
    ("saving_s", "saving", 0.1, "A longer --run.save-every"),
    (
        "looking_s",
        "probing the encoder",
        0.3,
        "A longer --run.probe-every, fewer --run.probe-images",
    ),
)
_ENOUGH, _MOST_WARNINGS = 20, 8
_SPREAD, _RANK = 0.1, 3.0
_LOST_KNN = 2.0
_MORE = (
    "More steps are the usual remedy: a longer --run.length, a smaller --optim.batch-size with "
    "--optim.lr as in the recipes for few images"
)
_SPARE = (
    "A lower --optim.encoder-lr or --optim.layer-decay, a longer --optim.freeze-encoder; "
    "encoder-best.safetensors is the best of all looks"
)


@dataclass(frozen=True)
class Advice:
    """A finding, its usual remedy, a command for it, and whether it spoils the run."""

    text: str
    remedy: str = ""
    serious: bool = True
    command: str = ""


def advise(story: Story) -> list[Advice]:
    """All problems found, those that spoil the run first."""
    rules = (_ended, _warned, _skipped, _collapsed, _worthless, _past_its_best, _flat, _slow)
    found = [advice for rule in rules for advice in rule(story)]
    return sorted(found, key=lambda advice: not advice.serious)


def _ended(story: Story) -> Iterator[Advice]:
    """A run that is not whole."""
    run = story.run
    if run.state in ("running", "finished"):
        return
    of = f" of {run.total:,}" if run.total else ""
    why = f": {run.said}" if run.said else ""
    text = f"The run is {run.state} at step {run.step:,}{of}{why}"
    mild = run.state in ("stopped", "unknown")
    yield Advice(text, "Go on with" if run.resume else "", not mild, run.resume)


def _warned(story: Story) -> Iterator[Advice]:
    """Warnings of the run itself, each kind once, with the step of the first.

    They are mild where the last of them is that something is over.
    """
    first: dict[str, tuple[int, str]] = {}
    over = False
    for row in story.run.rows:
        line = row.get("warning")
        if isinstance(line, str):
            text = line.partition(": ")[2] if line.startswith("step ") else line
            over = text.startswith("no longer")
            first.setdefault(re.sub(r"[\d.]+", "#", text), (row["step"], text))
    for step, text in list(first.values())[:_MOST_WARNINGS]:
        mild = over or text.startswith("no longer")
        yield Advice(f"Warning at step {step:,}: {text}", serious=not mild)
    if len(first) > _MOST_WARNINGS:
        more = len(first) - _MOST_WARNINGS
        yield Advice(f"{more} more warnings are in metrics.jsonl", serious=False)


def _skipped(story: Story) -> Iterator[Advice]:
    """Steps that moved nothing."""
    done, lost = 0, 0.0
    for step, share in story.run.series("skipped"):
        lost += share * (step - done)
        done = step
    if lost >= 0.5:
        yield Advice(
            f"{lost:.0f} of {done:,} steps were skipped: a loss or gradient was not finite",
            "Lower --optim.lr, or set --optim.clip 1; broken images may be a cause",
            serious=lost > 0.01 * done,
        )


def _collapsed(story: Story) -> Iterator[Advice]:
    """Features that are nearly the same for all images."""
    spread, rank = story.run.latest("feature_std"), story.run.latest("rankme")
    seen = story.run.latest("held_out_images")
    if seen is not None and seen < _ENOUGH:
        return  # of so few images neither number means much
    if spread is not None and spread < _SPREAD:
        yield Advice(
            f"Feature spread is {spread:.2g} (below {_SPREAD:g}): all images have nearly the same "
            "features",
            "A longer warm-up, a lower --optim.lr, and the remedies in the run's own warnings",
        )
    elif rank is not None and rank < _RANK:
        yield Advice(
            f"Effective rank is {rank:.1f} (below {_RANK:g}): the features use few directions",
            "A longer warm-up, a lower --optim.lr, or simply more steps",
        )


def _worthless(story: Story) -> Iterator[Advice]:
    """An encoder that is not better than none, beyond what chance would do."""
    closing = [s for s in story.scores if s.of]
    for scored in (s for s in closing if s.own):
        for other in closing:
            if other.own or other.evaluator != scored.evaluator:
                continue
            if scored.score.interval[1] < other.score.interval[0]:
                whose = "an untrained encoder" if other.untrained else other.of
                whose = "the weights it began with" if other.of == GIVEN else whose
                name = evaluator(scored.evaluator)
                yield Advice(
                    f"{name}: {scored.first:.1f} %, below the {other.first:.1f} % of {whose}",
                    _SPARE if other.of == GIVEN else _MORE,
                    serious=other.untrained,
                )


def _past_its_best(story: Story) -> Iterator[Advice]:
    """k-NN that was better before."""
    own = story.run.knn
    points = story.run.series(own[0]) if own else []
    if len(points) < 3:
        return
    step, best = max(points, key=lambda point: point[1])
    last = points[-1][1]
    if last < best - _LOST_KNN:
        yield Advice(
            f"k-NN was best at step {step:,} ({best:.1f} %) and is {last:.1f} % now",
            "Look at the curves there; --run.keep-every keeps checkpoints for good",
        )


def _flat(story: Story) -> Iterator[Advice]:
    """A loss that does not fall, where the method states that it should."""
    if story.run.config.get("init.encoder"):
        return  # one that begins with given weights begins low
    for name, scalar in method_scalars(story.run.method).items():
        losses = [value for _, value in story.run.series(name)]
        if not scalar.falls or len(losses) < 10:
            continue
        part = len(losses) // 5
        what = "The loss" if name == "loss" else scalar.title
        first, last = median(losses[:part]), median(losses[-part:])
        if last > 0.98 * first:
            yield Advice(
                f"{what} does not fall: {first:.3g} in the first fifth, {last:.3g} in the last",
                "A higher --optim.lr (small batches need their own), more steps",
            )


def _slow(story: Story) -> Iterator[Advice]:
    """Time that is not spent on training."""
    run = story.run
    waits = [value for _, value in run.series("waiting")]
    if waits and median(waits) > _WAITING:
        yield Advice(
            f"{100 * median(waits):.0f} % of the time went by waiting for images",
            "More --data.workers, tar shards instead of single files, smaller images on disk",
            serious=False,
        )
    slow, usual = (dict(run.series(name)) for name in ("slowest_s", "median_s"))
    ratios = [slow[step] / usual[step] for step in slow if usual.get(step)]
    if ratios and median(ratios) > _SLOW:
        yield Advice(
            f"The slowest process takes {median(ratios):.1f} times the median: all wait for it",
            "Look at that machine: other jobs, heat, a slow disk",
            serious=False,
        )
    whole = float(story.seconds[-1]) if len(story.steps) else 0.0
    for name, what, share, remedy in _PAUSES:
        spent = story.total(name) or 0.0
        if whole and spent > share * whole:
            text = f"{100 * spent / whole:.0f} % of the time went into {what}"
            yield Advice(text, remedy, serious=False)
