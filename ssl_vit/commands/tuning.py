"""Tuning session: a run that trains an encoder for a task, and leaves a network with its scores."""

from __future__ import annotations

import shlex
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ssl_vit.commands.cli import show_table
from ssl_vit.commands.evaluating import warn_same_images
from ssl_vit.common.figures import save_png
from ssl_vit.common.task import Task
from ssl_vit.data.base import Source
from ssl_vit.data.view import View
from ssl_vit.evaluators.classifier import saved_step
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.protocol import write_card
from ssl_vit.evaluators.score import Score
from ssl_vit.evaluators.start import Start
from ssl_vit.evaluators.tuned import Judged, Tuned, tuned_card
from ssl_vit.evaluators.watch import bounded
from ssl_vit.training.session import Session
from ssl_vit.weights.exchange import sha256
from ssl_vit.weights.own_files import MODEL_FILE


class Tuning(Session):
    """Tuning session.

    Attributes:
        start: the encoder that training begins with.
        view: how images are prepared for evaluation; ``machine``: what evaluates them.
        card_file, model_file: names of the scores' file and of the network's.
    """

    start: Start
    view: View
    machine: Machine
    card_file: ClassVar[str]
    model_file: ClassVar[str] = MODEL_FILE

    @abstractmethod
    def tuned(self, task: Any) -> Tuned:
        """The network of a task of this run, to be scored and saved."""

    @abstractmethod
    def about(self) -> list[tuple[str, str]]:
        """Plan rows on the network and its recipe."""

    def evaluate_at(self, size: tuple[int, int], at_once: int) -> None:
        """Set ``view`` and ``machine``: images of ``size``, ``at_once`` in a batch."""
        data, images = self.config.data, self.images
        self.view = View(size, data.channels, images.mean, images.std)
        precision = self.trainer.precision
        self.machine = Machine(self.parallel.device, precision, data.workers, at_once)

    def export(self, whole: Task) -> Callable[[], object]:
        """Snapshot of the network; the returned function writes its file."""
        path = self.out / self.model_file
        return self.tuned(whole).writer(path, self.start, self.trainer.step)

    def exported_step(self) -> int | None:
        """Step of the network's file; None: there is no file."""
        return saved_step(self.out / self.model_file)

    def looked_at(self) -> Source:
        """Held-out images of a probe: a bounded number of them."""
        run = self.config.run
        return bounded(self.images.val, run.probe_images, run.seed)

    def judge(self, task: Task, source: Source) -> Judged:
        """Score of the network on all images of a source."""
        return self.tuned(task).judge(source, self.machine, self.config.run.seed)

    def card(self, judged: Judged) -> dict[str, Any]:
        """Protocol card of the score on the validation images."""
        path, tuned = self.out / self.model_file, self.tuned(self.task)
        return tuned_card(
            self.name,
            tuned,
            judged,
            self.start.identity,
            (self.images.train, self.images.val),
            self.machine,
            options=asdict(self.config),
            model={"file": str(path), "sha256": sha256(path), **tuned.model()},
            step=self.trainer.step,
        )


def show_results(session: Tuning) -> dict[str, float]:
    """Print the scores of the final weights and the files of the run; returns the scores."""
    judged, out = session.judge(session.task, session.images.val), session.out
    card, tuned = session.card(judged), session.tuned(session.task)
    warn_same_images(*(card[split]["content_sha256"] for split in ("train", "val")))
    session.guard()
    write_card(out / session.card_file, card, judged.scores)
    show_scores(session.config.encoder, tuned, judged.scores, card)
    print(f"model:    {out / session.model_file}")
    save_pictures(out, judged.pictures)
    print(f"protocol and scores: {out / session.card_file}")
    print(f"curves:   tensorboard --logdir {shlex.quote(str(out))}")
    return {f"final/{n}": v for n, v in tuned.numbers(judged.scores).items()}


def show_scores(encoder: str, tuned: Tuned, scores: Sequence[Score], card: dict[str, Any]) -> None:
    """Print the table of scores."""
    n, m = (card[split]["images"] for split in ("val", "train"))
    unit, header, rows = tuned.table(scores)
    title = f"{card['evaluator']}: {encoder}, {n:,} evaluation and {m:,} training images, {unit}"
    show_table(title, rows, header=header)


def save_pictures(out: Path, pictures: Mapping[str, np.ndarray]) -> None:
    """Write pictures into a folder, by name, and print where they are."""
    for name, picture in pictures.items():
        save_png(out / f"{name}.png", picture)
        print(f"{name}: {out / name}.png")
