"""Tests outside of ``tests/gpu`` never see a GPU, nor do the processes that they start."""

import os

import pytest
import torch

from tests.conftest import ROOT, wants_gpu


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ([], False),
        (["tests"], False),
        (["tests/gpu"], True),
        (["tests/gpu/test_numbers.py::test_x", "tests/gpu"], True),
        (["tests/gpu", "tests/unit"], False),
        (["tests/gpus"], False),
    ],
)
def test_only_their_own_folder_asks_for_gpus(args, wanted):
    assert wants_gpu([str(ROOT / arg) for arg in args]) == wanted


def test_no_gpu_is_seen():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()
