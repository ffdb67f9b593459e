"""Spans of training, and schedules: plain functions of the optimizer step."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from ssl_vit.common.errors import UserError


@dataclass(frozen=True)
class Length:
    """Length of training: ``800ep`` (epochs, or parts of them), ``5000st`` (optimizer steps) or,
    of what is part of a run, ``10%`` of it."""

    amount: float
    unit: Literal["ep", "st", "%"]

    @classmethod
    def parse(cls, text: str, option: str, share: bool = False) -> "Length":
        """Parse ``text``; ``option`` names it in the error. ``share``: per cent are allowed."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(ep|st|%)", text.strip())
        if not found or (found[2] == "%" and not share):
            more = ", a share of the run as 10%" if share else ""
            raise UserError(
                f"{option} is {text!r}; allowed: epochs as 10ep{more}, or steps as 500st"
            )
        units: dict[str, Literal["ep", "st", "%"]] = {"ep": "ep", "st": "st", "%": "%"}
        return cls(float(found[1]), units[found[2]])

    def steps(self, steps_per_epoch: int, total: int = 0) -> int:
        """Length in optimizer steps, rounded; ``total``: of the run, of which it may be a share."""
        of = {"ep": steps_per_epoch, "st": 1, "%": total / 100}
        return round(self.amount * of[self.unit])


def warmup_cosine(step: int, *, warmup: int, total: int, peak: float, end: float = 0.0) -> float:
    """Warm-up, linear from 0 to ``peak`` in ``warmup`` steps; then half a cosine to ``end``.

    The learning-rate schedule of MAE (He et al. 2022, appendix A.1), evaluated per step.
    """
    if step < warmup:
        return peak * step / warmup
    share = (step - warmup) / max(1, total - warmup)
    return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
