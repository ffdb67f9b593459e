"""Collapse detection: feature statistics that reveal what a falling loss does not."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


def feature_spread(features: Float[Tensor, "n d"]) -> float:
    """Feature spread: mean over dimensions of the std of L2-normalised features, times sqrt(d).

    1 for features spread evenly over the sphere, 0 for collapsed ones (Chen and He 2021, section
    4.1).
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return float(unit.std(0, correction=0).mean() * features.shape[1] ** 0.5)


def effective_rank(features: Float[Tensor, "n d"]) -> float:
    """RankMe (Garrido et al. 2023, equation 1): exp of the entropy of normalised singular values.

    Between 1 (all features on a line) and min(n, d).
    """
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def health(features: Float[Tensor, "n d"]) -> dict[str, float]:
    """Feature spread and RankMe, under the names they are logged by."""
    return {"feature_std": feature_spread(features), "rankme": effective_rank(features)}


@dataclass
class Alarm:
    """Alarm: reports a concern once it has lasted for a while, and when it is over.

    after: steps at the start (the warm-up) in which nothing is reported.
    patience: steps for which a concern must have been present at every check.
    """

    after: int
    patience: int = 50
    since: dict[str, int] = field(default_factory=dict)
    reported: set[str] = field(default_factory=set)

    def news(self, step: int, concerns: dict[str, str]) -> list[str]:
        """Lines to log after ``step``, given the present concerns (by name, a line each)."""
        if step <= self.after:
            return []
        lines = [
            f"step {step}: no longer: {name}" for name in sorted(self.reported - concerns.keys())
        ]
        self.reported &= concerns.keys()
        self.since = {name: self.since.get(name, step) for name in concerns}
        for name, line in concerns.items():
            if name not in self.reported and step - self.since[name] >= self.patience:
                lines.append(f"step {step}: {line}")
                self.reported.add(name)
        return lines
