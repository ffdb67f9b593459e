"""The encoder of any method frozen at first and then released, as a function of the step."""

import torch

from tests.contract import tiny
from tests.contract.test_training import from_the_first_step, outcome

HELD = ("--optim.freeze-encoder", "2st", "--optim.release", "2st", "--optim.weight-decay", "0.5")
HELD += ("--optim.weight-decay-end", "0.5")


def test_a_frozen_encoder_neither_moves_nor_decays_nor_has_moments(name):
    """For two steps; at the third its rate is 0, at the fourth half its own."""
    made = tiny.session(name, *HELD)
    encoder = dict(made.task.encoder.named_parameters())
    trained = {key: p for key, p in encoder.items() if p.requires_grad}
    first, whole = tiny.state(made.task.encoder), tiny.state(made.task)
    loaded = tiny.batches(made)
    made.task.train()
    for share in (0.0, 0.0, 0.0, 0.5):
        scalars = made.trainer.update([next(loaded)])
        made.trainer.step += 1
        assert scalars["encoder_share"] == share
        frozen = made.trainer.step <= 2
        assert all((p in made.trainer.optimizer.state) != frozen for p in trained.values())
        moved = [key for key, p in encoder.items() if not torch.equal(p, first[key])]
        assert bool(moved) == (share > 0), moved
    now = made.task.state_dict()
    assert all(torch.equal(now[f"encoder.{key}"], first[key]) for key in encoder.keys() - trained)
    heads = [k for k, v in now.items() if not k.startswith("encoder.") and "teacher" not in k]
    assert any(not torch.equal(now[key], whole[key]) for key in heads)


def test_it_goes_on_to_the_bit_while_it_is_frozen(name, tmp_path):
    """After the first of two frozen steps."""
    one, two = from_the_first_step(name, tmp_path, *HELD)
    assert outcome(two) == outcome(one)


def test_a_run_frozen_to_its_end_says_so(name, caplog):
    made = tiny.session(name, "--optim.freeze-encoder", "100%")
    assert "never moves" in dict(made.plan([]))["encoder's rate"]
    assert "--optim.freeze-encoder" in caplog.text


def test_the_length_may_be_a_share_of_the_run(name):
    made = tiny.session(name, "--optim.freeze-encoder", "50%")
    assert made.trainer.schedule.frozen == tiny.STEPS // 2
