"""Batches on their way to the device: on CUDA one is copied while another is in use."""

import pytest

from tests.unit.training import test_prefetch as same


@pytest.mark.parametrize("n", [0, 1, 2, 30])
def test_batches_arrive_whole_and_in_order(n, device):
    same.whole_and_in_order(device.type, n)


def test_no_more_is_taken_than_one_batch_ahead(device):
    same.no_more_is_taken(device.type, ahead=int(device.type == "cuda"))


def test_errors_come_through(device):
    same.errors_come_through(device.type)
