"""Convolutional stems: which methods may have one, and which hide patches."""

import pytest

from ssl_vit.common.errors import UserError
from tests.contract import tiny

CONV = ("--encoder.stem", "conv", "--optim.freeze-encoder", "0st")


@pytest.mark.parametrize("name", ["dino", "distill", "lejepa"])
def test_methods_that_show_all_patches_take_one(name):
    assert tiny.session(name, *CONV).task.encoder.config.stem == "conv"


@pytest.mark.parametrize("name", ["dinov2", "ibot", "ijepa", "mae", "mae_dino", "simmim"])
def test_methods_that_hide_patches_refuse_one(name):
    with pytest.raises(UserError, match=r"methods that hide patches need --encoder\.stem patch"):
        tiny.session(name, *CONV)
