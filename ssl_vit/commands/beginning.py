"""Looks at an encoder that began with given weights, each beside the first one, of the start."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_vit.evaluators.watch import Look
from ssl_vit.training.run_files import METRICS_FILE, read_rows
from ssl_vit.weights.own_files import BEST_FILE

# Names in metrics.jsonl: the score that is selected by, and the lower end of the interval of k-NN.
SELECTION, _LOW = "selection_knn", "knn_low"
# Name of the best encoder in the table of scores, its step aside.
BEST = "best encoder"
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
        """Those of a run up to a step; at step 0 there are none, whatever an earlier try left."""
        rows = read_rows(folder / METRICS_FILE) if step else []
        return cls([row for row in rows if _LOW in row and row["step"] <= step])

    def has(self, step: int) -> bool:
        """Whether there was one at this step."""
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


def verdict(looks: Looks, last: int, folder: Path) -> str:
    """Sentence on which encoder of a finished run is the better one; empty where nothing was
    selected by. ``last``: step of the last one."""
    best, final = looks.best, looks.rows[-1] if looks.rows else {}
    if best is None or final.get("step") != last or SELECTION not in final:
        return ""
    by = "leave-one-out k-NN of training images"
    if best["step"] == last:
        return f"the last encoder is the best, by {by}: {best[SELECTION]:.1f} %"
    which = "what training began with" if best["step"] == 0 else f"that of step {best['step']:,}"
    return (
        f"the best encoder is {which}, by {by}: {best[SELECTION]:.1f} %, the last has "
        f"{final[SELECTION]:.1f} %: use --encoder {folder / BEST_FILE}"
    )
