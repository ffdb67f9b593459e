"""Randomness as a function of keys, and the order of samples as a function of the step."""

import itertools

import numpy as np
import pytest
import torch

from ssl_vit.common.seeds import fold, fold_keys, seed_generators, uniform
from ssl_vit.data.order import Order, permute

MASK = (1 << 64) - 1
# The first outputs of SplitMix64 (Steele et al. 2014) from state 0, as published with xoshiro.
SPLITMIX_FROM_0 = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC)


def splitmix(state: int) -> int:
    """The output of SplitMix64 for a state that was already advanced, in plain integers."""
    z = state & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


# --- fold ---------------------------------------------------------------------------------------


def test_fold_is_splitmix64():
    """One value 0 gives the published first output; more are chained, as a plain loop does it."""
    assert fold(0) == SPLITMIX_FROM_0[0] >> 1
    key = 0
    for value in (7, 0, 123456789):
        key = splitmix((key + value + 1) * 0x9E3779B97F4A7C15)
    assert fold(7, 0, 123456789) == key >> 1


def test_generators_are_seeded_as_torch_does():
    for key in (0, 5, fold(7, 9)):
        torch.manual_seed(key)
        theirs = torch.randn(5), torch.rand(3)
        seed_generators(key, torch.device("cpu"))
        assert all(map(torch.equal, theirs, (torch.randn(5), torch.rand(3))))


@pytest.mark.parametrize("value", [0, 1, 2, 99, 2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1])
def test_folding_many_keys_is_folding_each(value):
    random = np.random.default_rng(0).integers(0, 2**63 - 1, 500, dtype=np.int64)
    keys = torch.tensor([0, 1, 2**62, 2**63 - 1, *random.tolist()])
    assert fold_keys(keys, value).tolist() == [fold(k, value) for k in keys.tolist()]


def test_fold_gives_other_keys_for_other_values():
    """Order and number of the values matter, near values do not collide, keys fit into int64."""
    tuples = [t for n in (1, 2, 3) for t in itertools.product(range(8), repeat=n)]
    keys = {fold(*t) for t in tuples}
    assert len(keys) == len(tuples)
    assert all(0 <= key < 1 << 63 for key in keys)


# --- uniform ------------------------------------------------------------------------------------


def test_uniform_is_splitmix64():
    """Key 0 gives the published outputs; any key, negative ones too, what a plain loop gives."""
    expected = [(value >> 40) / 2**24 for value in SPLITMIX_FROM_0]
    assert uniform(torch.tensor([0]), 4)[0].tolist() == expected
    keys = [0, 1, -1, fold(3), -fold(4), (1 << 63) - 1, -(1 << 63)]
    drawn = uniform(torch.tensor(keys), 9)
    for row, key in zip(drawn.tolist(), keys, strict=True):
        states = [key + counter * 0x9E3779B97F4A7C15 for counter in range(1, 10)]
        assert row == [(splitmix(state) >> 40) / 2**24 for state in states]


def test_uniform_is_uniform_and_independent():
    """Moments, histogram, and no correlation between keys or between numbers of a key."""
    keys = torch.tensor([fold(0, i) for i in range(2000)])
    x = uniform(keys, 50).double()
    assert x.min() >= 0
    assert x.max() < 1
    n = x.numel()
    assert abs(x.mean() - 1 / 2) < 4 * (1 / 12 / n) ** 0.5
    assert abs(x.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    counts = torch.histc(x, 64, 0, 1)
    assert ((counts - n / 64).square() / (n / 64)).sum() < 63 + 4 * (2 * 63) ** 0.5
    unit = (x - 0.5) * 12**0.5
    for a, b in ((unit[:-1], unit[1:]), (unit[:, :-1], unit[:, 1:])):
        assert abs((a * b).mean()) < 4 / a.numel() ** 0.5


def test_uniform_depends_on_the_key_alone():
    """Neither the rest of the batch nor how many numbers are drawn changes a number."""
    keys = torch.tensor([fold(i) for i in range(5)])
    whole = uniform(keys, 20)
    assert torch.equal(uniform(keys[3:4], 7), whole[3:4, :7])
    assert uniform(keys[:0], 7).shape == (0, 7)


# --- permute ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 64, 65, 1000, 4097])
def test_permute_is_a_bijection(n):
    for key in range(5):
        image = permute(np.arange(n), n, fold(key))
        assert sorted(image.tolist()) == list(range(n))


def test_permute_needs_no_neighbours():
    """A position goes to the same place alone as among all, even of very many."""
    whole = permute(np.arange(1000), 1000, 5)
    assert [int(permute(np.array([i]), 1000, 5)[0]) for i in (0, 1, 500, 999)] == [
        whole[0],
        whole[1],
        whole[500],
        whole[999],
    ]
    billion = permute(np.arange(10_000), 10**9, 5)
    assert len(set(billion.tolist())) == 10_000
    assert billion.min() >= 0
    assert billion.max() < 10**9


def test_permute_differs_by_key():
    """Two keys agree at about one position, as two random permutations do."""
    agreeing = [
        int((permute(np.arange(500), 500, fold(a)) == permute(np.arange(500), 500, fold(b))).sum())
        for a, b in itertools.combinations(range(12), 2)
    ]
    assert np.mean(agreeing) == pytest.approx(1.0, abs=0.5)
    assert max(agreeing) < 10


def test_permute_is_roughly_uniform():
    """Over keys, every position goes everywhere equally often; neighbours rarely stay so."""
    n, keys = 10, 4000
    images = np.stack([permute(np.arange(n), n, fold(key)) for key in range(keys)])
    for column in images.T:
        counts = np.bincount(column, minlength=n)
        assert ((counts - keys / n) ** 2 / (keys / n)).sum() < 9 + 5 * (2 * 9) ** 0.5
    steps = np.diff(images, axis=1)
    # Of ordered pairs of different places, (n - 1) of n (n - 1) are ascending neighbours.
    assert (steps == 1).mean() == pytest.approx(1 / n, abs=0.015)


# --- Order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_make_up_the_global_batch(world, accumulate):
    """Whatever the number of processes and parts, a step has the same images, each once."""
    whole = Order(n=50, batch_size=16, seed=3)
    for step in range(2 * whole.steps_per_epoch):
        epoch, batch = whole.part(step, 0)
        shares = [
            Order(50, 16, 3, accumulate, rank, world).part(step, part)
            for part in range(accumulate)
            for rank in range(world)
        ]
        assert {e for e, _ in shares} == {epoch}
        assert {len(share) for _, share in shares} == {16 // (world * accumulate)}
        assert np.concatenate([share for _, share in shares]).tolist() == batch.tolist()


def test_an_epoch_sees_distinct_images_and_drops_the_incomplete_batch():
    """Whole batches only; the images left over are others in the next epoch."""
    order = Order(n=50, batch_size=16, seed=0)
    assert order.steps_per_epoch == 3
    dropped = []
    for epoch in range(3):
        parts = [order.part(step, 0) for step in range(3 * epoch, 3 * epoch + 3)]
        assert [e for e, _ in parts] == [epoch] * 3
        seen = np.concatenate([batch for _, batch in parts]).tolist()
        assert len(seen) == len(set(seen)) == 48
        assert set(seen) <= set(range(50))
        dropped.append(set(range(50)) - set(seen))
    assert dropped[0] != dropped[1] != dropped[2]


def test_order_follows_from_seed_and_epoch():
    """Same seed, same order; another seed or epoch, another order."""

    def epoch_of(seed: int, epoch: int) -> list[int]:
        return Order(n=64, batch_size=64, seed=seed).part(epoch, 0)[1].tolist()

    assert epoch_of(1, 0) == epoch_of(1, 0)
    assert epoch_of(1, 0) != epoch_of(2, 0)
    assert epoch_of(1, 0) != epoch_of(1, 1)
