"""Schedules: plain functions of the optimizer step."""

import math


def warmup_cosine(step: int, *, warmup: int, total: int, peak: float, end: float = 0.0) -> float:
    """Warm-up, linear from 0 to ``peak`` in ``warmup`` steps; then half a cosine to ``end``.

    The learning-rate schedule of MAE (He et al. 2022, appendix A.1), evaluated per step.
    """
    if step < warmup:
        return peak * step / warmup
    share = (step - warmup) / max(1, total - warmup)
    return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
