"""What looks wrong with a run, judged by what it logged, each with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from ssl_vit.reporting.story import KNN, Scored, Story

# Thresholds; each is told in the line that it leads to.
_WAITING, _SLOW, _SAVING = 0.2, 1.5, 0.1
_SPREAD, _RANK = 0.1, 3.0
_LOST_KNN = 2.0
# Features as people say them.
CALLED = {"cls": "[CLS]", "mean": "mean patch"}


@dataclass(frozen=True)
class Advice:
    """What was seen, what usually helps, and whether it spoils the run."""

    text: str
    remedy: str = ""
    serious: bool = True


def advise(story: Story) -> list[Advice]:
    """All that looks wrong, what spoils the run first."""
    rules = (_ended, _told, _skipped, _collapsed, _worthless, _past_its_best, _flat, _slow)
    found = [advice for rule in rules for advice in rule(story)]
    return sorted(found, key=lambda advice: not advice.serious)


def _ended(story: Story) -> Iterator[Advice]:
    """A run that is not whole."""
    run = story.run
    if run.state in ("running", "finished"):
        return
    of = f" of {run.total:,}" if run.total else ""
    why = f": {run.said}" if run.said else ""
    remedy = f"Go on with: {run.resume}" if run.resume else ""
    text = f"The run is {run.state} at step {run.step:,}{of}{why}"
    yield Advice(text, remedy, serious=run.state != "stopped")


def _told(story: Story) -> Iterator[Advice]:
    """Warnings of the run itself, each once, with when it was told first."""
    seen = set()
    for row in story.run.rows:
        line = row.get("warning")
        if isinstance(line, str):
            text = line.partition(": ")[2] if line.startswith("step ") else line
            if text not in seen:
                seen.add(text)
                over = text.startswith("no longer")
                yield Advice(f"Told at step {row['step']:,}: {text}", serious=not over)


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
    if spread is not None and spread < _SPREAD:
        yield Advice(
            f"Feature spread is {spread:.2g} (below {_SPREAD:g}): all images have nearly the same "
            "features",
            "A longer warm-up, a lower --optim.lr; with DINO also what its own warnings say",
        )
    elif rank is not None and rank < _RANK:
        yield Advice(
            f"Effective rank is {rank:.1f} (below {_RANK:g}): the features use few directions",
            "A longer warm-up, a lower --optim.lr, or simply more steps",
        )


def _worthless(story: Story) -> Iterator[Advice]:
    """An encoder that is not better than none, beyond what chance would do."""
    own = [s for s in story.scores if s.of.endswith(" encoder") and not _untrained(s)]
    for scored in own:
        for other in story.scores:
            rival = other.of == "raw pixels" or _untrained(other)
            if not rival or other.evaluator != scored.evaluator or other.file != scored.file:
                continue
            if scored.score.interval[1] < other.score.interval[0]:
                name = {"knn": "k-NN", "linear": "linear probe"}[scored.evaluator]
                ours, theirs = (next(iter(s.score.metrics.values())) for s in (scored, other))
                whose = "an untrained encoder" if _untrained(other) else other.of
                yield Advice(
                    f"{name}: {ours:.1f} %, below the {theirs:.1f} % of {whose}",
                    "More steps are the usual remedy: a longer --run.length, a smaller "
                    "--optim.batch-size with --optim.lr as in the recipes for few images",
                    serious=_untrained(other),
                )


def _untrained(scored: Scored) -> bool:
    return scored.of in ("random encoder", "initial encoder")


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
    """A loss that does not fall, of a method of which it should."""
    losses = [value for _, value in story.run.series("loss")]
    if story.run.method != "mae" or len(losses) < 10:
        return
    part = len(losses) // 5
    first, last = median(losses[:part]), median(losses[-part:])
    if last > 0.98 * first:
        yield Advice(
            f"The loss does not fall: {first:.3g} in the first fifth, {last:.3g} in the last",
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
    slow, usual = run.latest("slowest_s"), run.latest("median_s")
    if slow and usual and slow > _SLOW * usual:
        yield Advice(
            f"The slowest process takes {slow / usual:.1f} times the median: all wait for it",
            "Look at that machine: other jobs, heat, a slow disk",
            serious=False,
        )
    saving, whole = (
        story.total("saving_s") or 0.0,
        float(story.seconds[-1]) if len(story.steps) else 0,
    )
    if whole and saving > _SAVING * whole:
        yield Advice(
            f"{100 * saving / whole:.0f} % of the time went into saving",
            "A longer --run.save-every",
            serious=False,
        )


def knn_names(story: Story) -> dict[str, str]:
    """The k-NN curves of a run: the name in its file by what people call it ([CLS], mean patch)."""
    return {
        CALLED.get(found[1], found[1]): name
        for name in story.names
        if (found := KNN.fullmatch(name))
    }
