"""The term that keeps any method's features near those of the weights that it began with."""

from dataclasses import replace

import pytest
import torch

from ssl_vit.commands.pretraining import build
from ssl_vit.common.errors import UserError
from tests.contract import tiny

AT_ONCE = ("--optim.freeze-encoder", "0st", "--optim.release", "0st", "--optim.lr", "1e-2")


def test_the_distance_is_0_at_first_and_then_part_of_the_loss(name, encoder_options):
    config = tiny.options(name, *encoder_options, *AT_ONCE)[1]
    free, kept = (
        build(name, replace(config, init=replace(config.init, keep_near=w))) for w in (0.0, 3.0)
    )
    assert free.task.state_dict().keys() == kept.task.state_dict().keys()
    assert len(list(free.task.parameters())) == len(list(kept.task.parameters()))
    views, losses = tiny.first_views(free), []
    for made in (free, kept):
        made.task.eval()
        losses.append(made.task(views, 0)["loss"])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    one, two = tiny.train(free), tiny.train(kept)
    assert "start_distance" not in one[0]
    assert two[0]["start_distance"] == pytest.approx(0, abs=1e-6)
    assert two[-1]["start_distance"] > 1e-5
    first = kept.task.nearness
    distances = [first.distance(made.task.encoder, views.crops[0]) for made in (free, kept)]
    assert distances[1] < distances[0]


def test_without_given_weights_it_is_refused(name):
    with pytest.raises(UserError, match=r"--init.keep-near is 1; it has no effect without"):
        tiny.options(name, "--init.keep-near", "1")
