"""Batches on their way to a CUDA device: one is copied while another is in use."""

import pytest

from tests.unit.training import test_prefetch as same


@pytest.mark.parametrize("n", [0, 1, 2, 30])
def test_batches_arrive_whole_and_in_order(n):
    same.whole_and_in_order("cuda", n)


def test_no_more_is_taken_than_one_batch_ahead():
    same.no_more_is_taken("cuda", ahead=1)


def test_errors_come_through():
    same.errors_come_through("cuda")
