"""Spans of training, and schedules: plain functions of the optimizer step."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from ssl_vit.common.errors import UserError


@dataclass(frozen=True)
class Length:
    """Length of training: ``800ep`` (epochs, or parts of them) or ``5000st`` (optimizer steps)."""

    amount: float
    unit: Literal["ep", "st"]

    @classmethod
    def parse(cls, text: str, option: str) -> "Length":
        """Parse ``text``; ``option`` names it in the error."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(ep|st)", text.strip())
        if not found:
            raise UserError(f"{option} is {text!r}; allowed: epochs as 10ep, or steps as 500st")
        return cls(float(found[1]), "ep" if found[2] == "ep" else "st")

    def steps(self, steps_per_epoch: int) -> int:
        """Length in optimizer steps, rounded."""
        return round(self.amount * (steps_per_epoch if self.unit == "ep" else 1))


def warmup_cosine(step: int, *, warmup: int, total: int, peak: float, end: float = 0.0) -> float:
    """Warm-up, linear from 0 to ``peak`` in ``warmup`` steps; then half a cosine to ``end``.

    The learning-rate schedule of MAE (He et al. 2022, appendix A.1), evaluated per step.
    """
    if step < warmup:
        return peak * step / warmup
    share = (step - warmup) / max(1, total - warmup)
    return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
