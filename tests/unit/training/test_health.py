"""Health numbers of known matrices, and the alarm that watches them."""

import math

import pytest
import torch

from ssl_vit.training.health import Alarm, effective_rank, feature_spread, health


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_effective_rank_of_known_matrices():
    """1 on a line, d for equal singular values, the entropy's exponential between them."""
    assert effective_rank(torch.outer(normal(50), normal(8))) == pytest.approx(1, abs=1e-3)
    orthogonal = torch.linalg.qr(normal(50, 8))[0]
    assert effective_rank(3 * orthogonal) == pytest.approx(8, rel=1e-3)
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    shares = [0.5, 0.25, 0.125, 0.125]
    expected = math.exp(-sum(s * math.log(s) for s in shares))
    assert effective_rank(orthogonal[:, :4] * values) == pytest.approx(expected, rel=1e-3)
    assert effective_rank(normal(5000, 16)) == pytest.approx(16, rel=0.01)


def test_the_spread_of_known_features():
    """1 on the whole sphere, 0 when collapsed, whatever the length of the features."""
    even = normal(5000, 32)
    assert feature_spread(even) == pytest.approx(1, abs=0.02)
    assert feature_spread(even * 100) == pytest.approx(feature_spread(even), rel=1e-6)
    assert feature_spread(normal(1, 32).expand(50, -1)) == pytest.approx(0, abs=1e-6)
    # Half at one axis, half at another: deviation 1/2 in two dimensions of four, times sqrt(4).
    axes = torch.eye(4)[[0, 1] * 10]
    assert feature_spread(axes) == pytest.approx(2 * (0.5 + 0.5) / 4, rel=1e-6)


def test_health_survives_what_is_dead():
    found = health(torch.zeros(10, 4))
    assert list(found) == ["feature_std", "rankme"]
    assert all(math.isfinite(v) for v in found.values())


# --- the alarm ------------------------------------------------------------------------------------


def test_alarm():
    """Said once when it has lasted, once when it is over; never within the warm-up."""
    alarm = Alarm(after=20, patience=30)
    there = {"asleep": "the teacher sleeps"}
    said = {step: alarm.news(step, there if step <= 100 else {}) for step in range(10, 200, 10)}
    assert {k: v for k, v in said.items() if v} == {
        60: ["step 60: the teacher sleeps"],
        110: ["step 110: no longer: asleep"],
    }


def test_alarm_of_what_comes_and_goes():
    """A concern that is not present at every check has not lasted."""
    alarm = Alarm(after=0, patience=30)
    for step in range(10, 200, 10):
        assert alarm.news(step, {"asleep": "..."} if step % 40 else {}) == []
