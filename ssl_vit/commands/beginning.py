"""Looks at an encoder that began with given weights, each beside the first one, of the start; and
the images that are held out to choose the best one by."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssl_vit.common.reading import DataConfig
from ssl_vit.data.base import epoch_length, known_labels, split_holdout
from ssl_vit.data.images import Images
from ssl_vit.evaluators.watch import Look, why_no_knn
from ssl_vit.training.run_files import METRICS_FILE, read_rows
from ssl_vit.weights.own_files import BEST_FILE

# Names in metrics.jsonl: the score that is selected by, and the lower end of the interval of k-NN.
SELECTION, _LOW = "selection_knn", "knn_low"
# Images with labels without which none are held out to choose by: one is 2 points of their k-NN.
_LEAST = 50
_REMEDIES = (
    "Usual remedies: a lower --optim.encoder-lr, a longer --optim.freeze-encoder, "
    "--init.keep-near 1"
)


@dataclass
class Looks:
    """The looks so far, as rows of metrics.jsonl, oldest first: all that is remembered of them, so
    that a run that goes on compares with the same numbers."""

    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, step: int) -> Looks:
        """Evaluations of a run up to a step; none at step 0, whatever an earlier try left."""
        rows = read_rows(folder / METRICS_FILE) if step else []
        return cls([row for row in rows if _LOW in row and row["step"] <= step])

    def has(self, step: int) -> bool:
        """True if there was an evaluation at this step."""
        return any(row["step"] == step for row in self.rows)

    @property
    def best(self) -> dict[str, Any] | None:
        """Row of the best by the selection score, the first of equal ones; None: none has it."""
        scored = [row for row in self.rows if row.get(SELECTION) is not None]
        return max(scored, key=lambda row: float(row[SELECTION])) if scored else None

    def add(self, step: int, look: Look) -> dict[str, float]:
        """Remember a look; what is logged of it beside its numbers."""
        found = {_LOW: look.low, SELECTION: look.selection}
        more = {name: value for name, value in found.items() if value is not None}
        # As metrics.jsonl has it, so that equal looks are equal after it has been read.
        row = {k: float(f"{v:.7g}") for k, v in (look.numbers | more).items()}
        self.rows += [{"step": step, **row}] if _LOW in more else []
        return more

    def news(self) -> str:
        """Line on the last look if k-NN has come to lie below the start's interval, or is back;
        else empty. Of several features the best one counts, then and now."""
        if len(self.rows) < 2 or self.rows[0]["step"]:
            return ""
        start, *later = self.rows
        low = float(start[_LOW])
        below = [_knn(row) < low for row in later]
        step, before = later[-1]["step"], len(below) > 1 and below[-2]
        if below[-1] and not before:
            kept = "" if self.best is None else f"; the best so far is kept as {BEST_FILE}"
            return (
                f"step {step}: k-NN is {_knn(later[-1]):.1f} %, below the {_knn(start):.1f} % "
                f"(95 % from {low:.1f}) of the weights that training began with. {_REMEDIES}{kept}"
            )
        return f"step {step}: no longer: k-NN below the start's" if before and not below[-1] else ""


def _knn(row: dict[str, Any]) -> float:
    """k-NN of the best feature in a row; NaN where there is none."""
    found = [v for k, v in row.items() if re.match(r"knn\d+_", k) and v is not None]
    return max(map(float, found), default=math.nan)


def with_choice(images: Images, data: DataConfig, batch: int, seed: int) -> Images:
    """Hold images out, neither trained on nor scored, to choose the best encoder by: they become
    ``Images.choice``. Where k-NN cannot be measured all is as it was; where too few can be held
    out, too, and ``Images.no_choice`` says why.

    Without ``data.val`` they are half of the held-out images: ``data.holdout`` is then the number
    of all that are not trained on, and those trained on are the same as without this. With it they
    are the training images that would be held out without it. By the seed, in whole groups.

    ``batch``: images of a step, for which enough must remain.
    """
    if not images.held_out or why_no_knn(images.train, images.val):
        return images
    train, val = images.train, images.val
    if data.val:
        train, choice = split_holdout(train, data.holdout, seed)
        limit = f"--data.holdout {data.holdout}, at most a tenth of the training images"
    else:
        val, choice = split_holdout(val, len(val), seed, parts=2)
        limit = f"half of the {len(images.val):,} that are held out"
    known, why = int(known_labels(choice).sum()), ""
    if known < _LEAST:
        why = f"{known} with labels can be held out for it ({limit}), {_LEAST} are needed"
    elif epoch_length(train) < batch:
        why = f"--optim.batch-size {batch} leaves none to hold out for it"
    elif reason := why_no_knn(train, val):
        why = f"with images held out for it there is no k-NN ({reason})"
    if why:
        return replace(images, no_choice=why)
    return replace(images, train=train, val=val, choice=choice)


def verdict(looks: Looks, last: int, folder: Path, by: str) -> str:
    """Sentence on which encoder of a finished run is the better one; empty where nothing was
    selected by. ``last``: step of the last one; ``by``: what is selected by, in words."""
    best, final = looks.best, looks.rows[-1] if looks.rows else {}
    if best is None or final.get("step") != last or SELECTION not in final:
        return ""
    if best["step"] == last:
        return f"the last encoder is the best, by {by}: {best[SELECTION]:.1f} %"
    which = "what training began with" if best["step"] == 0 else f"that of step {best['step']:,}"
    if best[SELECTION] == final[SELECTION]:
        return f"the last encoder is as good as {which}, by {by}: {final[SELECTION]:.1f} %"
    return (
        f"the best encoder is {which}, by {by}: {best[SELECTION]:.1f} %, the last has "
        f"{final[SELECTION]:.1f} %: use --encoder {folder / BEST_FILE}"
    )
