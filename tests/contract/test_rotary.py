"""Every method on an encoder whose positions turn queries and keys, changed in training."""

import pytest
import torch

from ssl_vit.weights.exchange import load_encoder, save_encoder
from tests.contract import tiny

# The small scale of layers that DINOv3 begins with would hide what attention does.
ROTARY = ("--encoder.arch", "vit_small_patch16_dinov3", "--encoder.layer-scale", "1")
ROTARY += ("--encoder.rope-rescale", "2")


@pytest.fixture(scope="module")
def trained(name: str) -> tuple[tiny.Pretraining, dict[str, torch.Tensor], list[dict[str, float]]]:
    """After two steps; its first state, and the numbers of the steps."""
    made = tiny.session(name, *ROTARY, *tiny.splitting(name))
    before = tiny.state(made.task)
    return made, before, tiny.train(made, 2)


def test_it_trains(trained):
    """Every weight of the encoder moves, but for a last bias that no loss depends on."""
    made, before, said = trained
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in said)
    after = made.task.state_dict()
    still = {n for n in after if torch.equal(before[n], after[n])}
    fixed = {n for n, p in made.task.named_parameters() if not p.requires_grad}
    assert {n for n in fixed if n.startswith("encoder.")} <= {"encoder.vit.norm.bias"}
    assert not [n for n in still - fixed if n.startswith("encoder.")]


def test_parts_of_a_batch_are_the_batch(name, trained):
    """What is done to coordinates is drawn for the whole batch, not for a part."""
    one, first, _ = trained
    two = tiny.session(name, *ROTARY, *tiny.splitting(name), "--optim.accumulate", "2")
    tiny.train(two, 2)
    tiny.assert_same_training(first, tiny.state(one.task), tiny.state(two.task))


def test_its_encoder_opens_again(trained, tmp_path):
    made = trained[0]
    encoder = made.task.exported_encoder().eval()
    save_encoder(tmp_path / "encoder.safetensors", encoder, made.info())
    again = load_encoder(tmp_path / "encoder.safetensors")[0]
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(again(images).patches, encoder(images).patches)
