"""Steps whose loss stands out are skipped; processes that keep the others waiting are named."""

import pytest
import torch

from ssl_vit.data.batch import Batch
from ssl_vit.training.optim import SpikeGuard
from ssl_vit.training.pace import StepTimes
from ssl_vit.training.parallel import Parallel
from tests.unit.methods.test_dino import batch, dino, trainer

CPU = torch.device("cpu")


def losses(n: int, seed: int = 0) -> list[torch.Tensor]:
    """Around 2, with a standard deviation of 0.1."""
    return list(2 + 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(seed)))


def passed(guard: SpikeGuard, values: list[torch.Tensor]) -> list[bool]:
    return [bool(guard.passes(value)) for value in values]


def test_the_running_numbers_are_mean_and_variance():
    """Of all losses, until the window is full."""
    guard, seen = SpikeGuard(6.0, CPU), losses(80)
    assert all(passed(guard, seen))
    mean, variance, count = guard.state.values()
    assert mean.item() == pytest.approx(torch.stack(seen).mean().item(), rel=1e-5)
    assert variance.item() == pytest.approx(torch.stack(seen).var(correction=0).item(), rel=1e-4)
    assert count == 80


def test_a_spike_is_found_and_little_else():
    guard = SpikeGuard(6.0, CPU)
    early = torch.tensor(50.0)
    assert bool(guard.passes(early)), "nothing is known yet"
    guard = SpikeGuard(6.0, CPU)
    assert all(passed(guard, losses(1000)))
    assert passed(guard, [torch.tensor(3.0), torch.tensor(2.1)]) == [False, True]
    assert bool(guard.passes(torch.tensor(1.0))), "a sudden fall does no harm"
    assert bool(guard.passes(torch.tensor(torch.nan))), "that is another guard's"
    assert all(passed(guard, losses(100, seed=1)))


def test_a_lasting_change_becomes_the_new_level():
    guard = SpikeGuard(6.0, CPU)
    passed(guard, losses(300))
    after = passed(guard, [loss + 2 for loss in losses(100, seed=1)])
    assert not after[0]
    assert all(after[30:])


def test_off_it_is_off():
    guard = SpikeGuard(0.0, CPU)
    assert all(passed(guard, [*losses(200), torch.tensor(1e9)]))
    assert not guard.state["losses"]


def test_nothing_moves_on_a_spike():
    """Counted apart from what is not finite, and no reason to stop."""
    method = dino()
    run = trainer(method, spike=6.0)
    run.update([Batch(batch(4))])
    mean, variance, count = run.guard.state.values()
    mean.fill_(0.1), variance.fill_(1e-6), count.fill_(1000)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    scalars = run.update([Batch(batch(4, seed=1))])
    assert (scalars["spikes"], scalars["skipped"], run.streak) == (1, 0, 0)
    after = method.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    mean.fill_(1e3)
    scalars = run.update([Batch(batch(4, seed=1))])
    assert (scalars["spikes"], scalars["skipped"]) == (0, 0)
    assert not torch.equal(before["objectives.dino.center.value"], method.objective.center.value)


def test_a_slow_process_is_named_when_it_lasts():
    pace = StepTimes(Parallel(0, 4, CPU))
    pace.hosts = ["a", "a", "b", "b"]
    pace.all = [0.1, 0.11, 0.32, 0.1]
    assert pace.news(10) == []
    (line,) = pace.news(60)
    assert "process 2 (b) takes 0.32 s" in line
    assert "the median is 0.1 s" in line
    assert pace.news(70) == [], "once"
    pace.all = [0.1, 0.11, 0.14, 0.1]
    (line,) = pace.news(80)
    assert "no longer" in line


def test_what_is_timed_is_ones_own_work():
    """The wait for images and the forward pass, a step; then it begins anew."""
    pace = StepTimes(Parallel(0, 1, CPU))
    with pace.waiting():
        sum(range(100_000))
    assert pace.waited > 0
    before = pace.waited
    with pace:
        sum(range(100_000))
    waited, (own,) = pace.take(steps=2)
    assert waited == before
    assert own > before / 2
    assert pace.take(steps=1) == (0.0, [0.0])
    assert pace.news(100) == []
