"""Is the encoder alive? Numbers of its features that a falling loss does not show."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


def feature_spread(features: Float[Tensor, "n d"]) -> float:
    """Mean over dimensions of the standard deviation of L2-normalised features, times sqrt(d).

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
    """Both numbers, named as they are logged."""
    return {"feature_std": feature_spread(features), "rankme": effective_rank(features)}


@dataclass
class Alarm:
    """Tells what is worth saying: a concern, when it has lasted, and when it is over.

    after: steps at the start (the warm-up) in which any state is normal.
    patience: steps for which a concern must have been there at every look.
    """

    after: int
    patience: int = 50
    since: dict[str, int] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def news(self, step: int, concerns: dict[str, str]) -> list[str]:
        """Lines to say after ``step``, given the concerns there are now."""
        if step <= self.after:
            return []
        lines = [f"step {step}: no longer: {name}" for name in sorted(self.told - concerns.keys())]
        self.told &= concerns.keys()
        self.since = {name: self.since.get(name, step) for name in concerns}
        for name, line in concerns.items():
            if name not in self.told and step - self.since[name] >= self.patience:
                lines.append(f"step {step}: {line}")
                self.told.add(name)
        return lines
