"""Logistic regression on frozen features, by scikit-learn; C is selected on held-out data."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ssl_vit.common.checks import check_below_one, check_given, check_least, check_positive
from ssl_vit.common.errors import check
from ssl_vit.evaluators.features import FeatureSet
from ssl_vit.evaluators.linear import protocol_details
from ssl_vit.evaluators.linear_heads import FeatureNorm
from ssl_vit.evaluators.scores import Prediction
from ssl_vit.evaluators.selection import NOT_CHOSEN, best, outputs_of, quality, split_rows, usable

log = logging.getLogger("ssl_vit")
_TINY = 1e-30


@dataclass(frozen=True)
class LogregProtocol:
    """Logistic regression protocol ``logreg``: L2-regularised, L-BFGS to convergence, unaugmented.

    Features are standardised by the statistics of the training ones. ``strengths``: scikit-learn's
    C, the weight of the data's loss against half the squared norm of the weights, swept as for CLIP
    (Radford et al. 2021, appendix A.3), more coarsely. ``fallback`` is used where too few images
    remain to select on.
    """

    prefix: ClassVar[None] = None
    name: ClassVar[str] = "logreg"
    strengths: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    features: tuple[str, ...] = ("cls",)
    fallback: float = 1.0
    iterations: int = 500
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_given(self, "strengths")
        check_positive(self, "strengths")
        check_least(self, 1, "iterations")
        check_below_one(self, "held_out")


def logreg_probe(
    train: FeatureSet,
    val: FeatureSet,
    protocol: LogregProtocol | None = None,
    held_out: FeatureSet | None = None,
) -> list[Prediction]:
    """Logistic regression probe: predict ``val`` from each feature; C is selected on held-out data.

    Of equally good values the lowest C is selected, and refitted on all training images. With
    several labels per image each is a separate regression, with one C for all.
    """
    protocol = protocol or LogregProtocol()
    made = []
    for name in usable(protocol.features, train.has):
        found, stopped = _sweep(train, name, protocol, held_out)
        chosen = best(found)
        strength = chosen[1] if chosen else protocol.fallback
        norm = FeatureNorm.of(train.feature(name))
        model = Logistic(train.labels, strength, protocol.iterations).fit(norm(train.feature(name)))
        if stopped + model.stopped:
            log.warning(
                "logreg on %s: %d fits stopped after %d iterations without convergence",
                name,
                stopped + model.stopped,
                protocol.iterations,
            )
        resolved = {"C": strength, "not_converged": stopped, "chosen_converged": not model.stopped}
        details = protocol_details(
            protocol, found, resolved | ({} if chosen else {"selection": NOT_CHOSEN})
        )
        guesses = model.guesses(norm(val.feature(name)))
        made.append(Prediction(name, f"C={strength:g}", guesses, details))
    return made


def _sweep(
    train: FeatureSet, name: str, protocol: LogregProtocol, held_out: FeatureSet | None
) -> tuple[dict[tuple[str, float], float], int]:
    """Quality of each C on held-out images, and how many fits did not converge."""
    if held_out is None:
        rows = split_rows(train.labels, protocol.held_out, protocol.seed, train.groups)
        if rows is None:
            return {}, 0
        train, held_out = train.take(rows[0]), train.take(rows[1])
    norm = FeatureNorm.of(train.feature(name))
    features, scored = norm(train.feature(name)), norm(held_out.feature(name))
    found, stopped = {}, 0
    for strength in sorted(protocol.strengths):
        model = Logistic(train.labels, strength, protocol.iterations).fit(features)
        found[name, strength] = quality(model.logits(scored), held_out.labels.cpu())
        stopped += model.stopped
    return found, stopped


class Logistic:
    """Logistic regression over classes, or one for each of several labels.

    ``targets``: (n,) classes or (n, L) labels, 1, 0, or NaN where unknown. ``stopped``: how many
    regressions did not converge.
    """

    def __init__(self, targets: Tensor, strength: float, iterations: int) -> None:
        self.targets, self.strength, self.iterations = targets, strength, iterations
        self.stopped = 0
        self.models: list[Any] = []  # scikit-learn's, or a constant probability

    def fit(self, features: Float[Tensor, "n d"]) -> Logistic:
        """Fit to standardised features.

        Raises:
            UserError: all images are of one class.
        """
        x, targets = features.cpu().numpy(), self.targets.cpu().numpy()
        if targets.ndim == 1:
            one = len(np.unique(targets)) == 1
            check(not one, "all training images are of one class; at least two are needed")
            self.models = [self._regression(x, targets)]
            return self
        for wanted in targets.T:
            known = ~np.isnan(wanted)
            there = np.unique(wanted[known])
            if len(there) == 2:
                self.models.append(self._regression(x[known], wanted[known].astype(np.int64)))
            else:  # a constant label: always, never, or unknown
                self.models.append(float(there[0]) if len(there) else 0.5)
        return self

    def _regression(self, x: np.ndarray, y: np.ndarray) -> Any:
        # Late: other evaluators need not wait a second for it.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model = LogisticRegression(C=self.strength, max_iter=self.iterations).fit(x, y)
        self.stopped += any(issubclass(w.category, ConvergenceWarning) for w in caught)
        return model

    def probabilities(self, features: Float[Tensor, "q d"]) -> Float[Tensor, "q c"]:
        """Probabilities of each class up to the largest, 0 for unseen ones; or of each label."""
        x = features.cpu().numpy()
        if self.targets.ndim == 2:
            columns = [
                np.full(len(x), m) if isinstance(m, float) else m.predict_proba(x)[:, 1]
                for m in self.models
            ]
            return torch.from_numpy(np.stack(columns, axis=1)).float()
        model = self.models[0]
        made = torch.zeros(len(x), outputs_of(self.targets))
        made[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_proba(x)).float()
        return made

    def logits(self, features: Float[Tensor, "q d"]) -> Float[Tensor, "q c"]:
        """Log-probabilities, which rank classes and images the same way."""
        return self.probabilities(features).clamp(min=_TINY).log()

    def guesses(self, features: Float[Tensor, "q d"]) -> Tensor:
        """Guesses of a prediction: at most 5 classes, best first, or probabilities of labels."""
        made = self.probabilities(features)
        if self.targets.ndim == 2:
            return made
        return made.topk(min(5, made.shape[1]), dim=1).indices
