"""The encoder of a method: what it begins with, and what it leaves for others."""

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ssl_vit.common.errors import UserError
from ssl_vit.weights.exchange import load_encoder
from tests.contract import tiny


def test_it_begins_with_given_weights(name):
    """Also what is evaluated before the first step."""
    made = tiny.session(name)
    given = {
        key: torch.randn_like(value) for key, value in made.task.encoder.vit.state_dict().items()
    }
    made.task.begin_with(given, "given weights")
    for encoder in (made.task.encoder, made.task.exported_encoder()):
        own = encoder.vit.state_dict()
        assert own.keys() == given.keys()
        assert all(torch.equal(value, given[key]) for key, value in own.items())
    assert torch.isfinite(made.task(tiny.first_views(made), 0)["loss"])


def test_it_refuses_weights_that_are_not_its_encoders(name):
    task = tiny.session(name).task
    given = task.encoder.vit.state_dict()
    del given["norm.weight"]
    with pytest.raises(UserError, match=r"these weights.*norm\.weight"):
        task.begin_with(given, "these weights")


def test_a_convolutional_stem_learns_or_is_refused(name):
    """Refused where patches are hidden, which their neighbours would show; and at once."""
    try:
        made = tiny.session(name, "--encoder.stem", "conv", "--optim.freeze-encoder", "0st")
    except UserError as refused:
        if "methods that hide patches" in str(refused):
            return
        raise
    before = tiny.state(made.task.encoder.vit.patch_embed)
    tiny.train(made, 2)
    after = tiny.state(made.task.encoder.vit.patch_embed)
    assert len(before) == 10
    assert not [key for key in before if torch.equal(before[key], after[key])]


def test_plain_timm_loads_what_it_leaves(run):
    """All of it and nothing else, with the same features."""
    file = run / "encoder.safetensors"
    with safe_open(file, "pt") as opened:
        recipe = json.loads(opened.metadata()["ssl_vit"])["timm"]
    model = timm.create_model(recipe["arch"], num_classes=0, **recipe["kwargs"]).eval()
    model.load_state_dict(load_file(file), strict=True)
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        theirs, ours = model.forward_features(images), load_encoder(run)[0](images)
    torch.testing.assert_close(theirs[:, 0], ours.cls)
    torch.testing.assert_close(theirs[:, -16:], ours.patches)
