"""Story of a run, from its files: curves over images and time, pictures, scores, what it cost."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssl_vit.evaluators.score import GIVEN, PIXELS, RANDOM, Score
from ssl_vit.records.run_folder import PAUSES, Run, finite, read_run
from ssl_vit.reporting.explained import feature
from ssl_vit.training.panels import panels

# What is no curve: seconds beside the training, lists, flags of single steps.
_NO_CURVES = {"step", "warning", "process_s", "skipped", "spikes", "slowest_s", "median_s"}
_NO_CURVES |= {"held_out_images", "knn_low", *PAUSES}
TUNED = ("finetune", "detect")
"""Commands whose runs train an encoder on a task with labels, and score that."""
KNN = re.compile(r"knn\d+_(.+)")


@dataclass(frozen=True)
class Scored:
    """One score of a result file: of which ``features``, by which evaluator, and its ``card``."""

    file: Path
    evaluator: str
    of: str
    score: Score
    card: dict[str, Any]

    @property
    def own(self) -> bool:
        """True for the run's trained encoder, not for what it is compared with."""
        return self.of != PIXELS and not self.untrained

    @property
    def untrained(self) -> bool:
        """True for the encoder before the first step."""
        return self.of in (RANDOM, GIVEN)

    @property
    def scratch(self) -> bool:
        """True for a network that was tuned from random weights."""
        encoder = self.card.get("encoder")
        return isinstance(encoder, dict) and str(encoder.get("given")).startswith("random:")

    @property
    def first(self) -> float:
        """Value of the first metric, whose interval is given, in percent."""
        return next(iter(self.score.metrics.values()))


@dataclass
class Story:
    """A run with what can be read off its files.

    ``steps``, ``seconds``: (n,) after which steps lines were logged, and how long the training had
    taken by then, saving and probing included, of all tries together. ``problems``: what is missing
    or damaged, a line each.
    """

    run: Run
    name: str
    steps: np.ndarray
    seconds: np.ndarray
    scores: list[Scored]
    pictures: dict[str, dict[int, Path]]
    problems: list[str] = field(default_factory=list)

    @property
    def images(self) -> int | None:
        """Images seen so far, crops of one image being one; None where no file states the batch."""
        size = self.run.images_per_step
        return None if size is None else self.run.step * size

    def hours(self, steps: Any) -> Any:
        """Hours of training up to a step, or to each of some."""
        return np.asarray(np.interp(steps, [0, *self.steps], [0, *self.seconds])) / 3600

    def curve(self, name: str) -> list[dict[str, Any]]:
        """A logged number as points: after how many steps, images and hours, and its value.

        Where the batch is not known there are steps alone.
        """
        points = self.run.series(name)
        made = [{"step": step, "value": value} for step, value in points]
        size = self.run.images_per_step
        if size is not None:
            hours = self.hours([step for step, _ in points]).tolist() if points else []
            for point, passed in zip(made, hours, strict=True):
                point |= {"images": point["step"] * size, "hours": passed}
        return made

    @functools.cached_property
    def names(self) -> list[str]:
        """The numbers that were logged and are worth a curve, in the order of the file."""
        found = dict.fromkeys(name for row in self.run.rows for name in row)
        return [name for name in found if name not in _NO_CURVES and self.run.series(name)]

    def total(self, name: str) -> float | None:
        """The sum of what was logged under a name; None where it never was."""
        values = [value for _, value in self.run.series(name)]
        return sum(values) if values else None


def read_story(folder: Path, name: str = "") -> Story:
    """Read a run's folder; what is missing or damaged becomes a line of ``problems``."""
    run = read_run(folder)
    steps, seconds = clock(run)
    problems = list(run.problems)
    pictures = {
        kind: {step: file for step, file in by_step.items() if step <= run.step}
        for kind, by_step in panels(folder).items()
    }
    scores = read_scores(folder, problems)
    for name_of, picture in pictures_beside(folder, scores).items():
        pictures.setdefault(name_of, {run.step: picture})  # a panel's newest is there already
    return Story(run, name or folder.name, steps, seconds, scores, pictures, problems)


def pictures_beside(folder: Path, scores: list[Scored]) -> dict[str, Path]:
    """Pictures beside the result files of a run's folder: by their path in it without its ending.

    A frozen probe's bear the name of its result; in the folder of a tuned network all are its.
    """
    found: dict[str, Path] = {}
    for file, evaluator in dict.fromkeys((s.file, s.evaluator) for s in scores if not s.of):
        for picture in sorted(file.parent.glob("*.png")):
            own = picture.stem == file.stem or picture.stem.startswith(f"{file.stem}-")
            if own or evaluator in TUNED:
                found[picture.relative_to(folder).with_suffix("").as_posix()] = picture
    return found


def knn_names(story: Story) -> dict[str, str]:
    """The k-NN curves of a run: the name in its file by the feature as people call it."""
    found = {name: KNN.fullmatch(name) for name in story.names}
    return {feature(match[1]): name for name, match in found.items() if match}


def clock(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) of a run's lines, and the seconds (n,) it had taken by each.

    A line holds the rate over the steps since the one before, and the pauses among them; one after
    the last step holds pauses alone. Without the size of the batch nothing is known.
    """
    size, done, passed = run.images_per_step, 0, 0.0
    times: dict[int, float] = {}
    for row in run.rows if size else []:
        rate, step = row.get("images_per_s"), row["step"]
        passed += sum(row[name] for name in PAUSES if finite(row.get(name)))
        if isinstance(rate, int | float) and finite(rate) and rate > 0 and step > done:
            passed += (step - done) * (size or 0) / rate
            done = step
        if done:
            times[done] = passed
    return np.array(list(times)), np.array(list(times.values()))


def read_scores(folder: Path, problems: list[str]) -> list[Scored]:
    """The scores of every result file of a run, the run's own first.

    They lie in its folder and, of networks that were tuned from its encoder, in folders within.
    """
    own = folder / "results.json"
    files = [
        own,
        *sorted(f for f in folder.glob("*.json") if f not in (own, folder / "status.json")),
    ]
    for kind in TUNED:
        files += sorted(folder.glob(f"*/{kind}.json"))  # whatever --run.out was
    found: list[Scored] = []
    for file in files:
        if not file.is_file():
            continue
        try:
            card = json.loads(file.read_text())
            if not isinstance(card, dict) or "evaluator" not in card:
                continue  # not one of ours
            scores = card.pop("scores")
            if not isinstance(card["evaluator"], str):
                raise ValueError("no evaluator")
            if isinstance(scores, dict):  # of a run: by features, by evaluator
                made = [
                    Scored(file, evaluator, of, Score(**score), card)
                    for of, row in scores.items()
                    for evaluator, score in row.items()
                ]
            else:
                made = [
                    Scored(file, card["evaluator"], "", Score(**score), card) for score in scores
                ]
            for scored in made:
                _check(scored.score)
            found += made
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{file}: no result that can be read ({type(error).__name__})")
    return found


def _check(score: Score) -> None:
    """Raise ValueError for a score without its numbers, or with a table that is none."""
    values = [*score.metrics.values(), *score.interval]
    if not score.metrics or not all(finite(v) for v in values) or len(score.interval) != 2:
        raise ValueError("no numbers")
    if not isinstance(score.per_class, dict):
        raise ValueError("no classes")
    rows = score.confusion
    if rows is not None:
        whole = isinstance(rows, list) and all(
            isinstance(row, list) and len(row) == len(rows) and all(finite(n) for n in row)
            for row in rows
        )
        if not whole:
            raise ValueError("no table of classes")
