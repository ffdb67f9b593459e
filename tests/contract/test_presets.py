"""Augmentation presets: each reaches the crops of a method that has options for it."""

import torch

from tests.contract import tiny


def test_a_preset_reaches_the_crops(name):
    """By those of its values that the method has options for; a step is trained on them."""
    made = tiny.session(name, "--data.preset", "aerial")
    has = {option.name for option in tiny.method_options(made.config.method)}
    crops = made.views.crops
    for option, value in (("vertical_flip", 0.5), ("quarter_turns", 0.75)):
        assert {getattr(crop, option) for crop in crops} == {value if option in has else 0.0}
    levels = [crop.levels for crop in crops if crop.levels and crop.levels.on]
    assert bool(levels) == ("levels" in has)
    assert {own.drop for own in levels} <= {0.1 if "drop_channels" in has else 0.0}
    (scalars,) = tiny.train(made, 1)
    assert torch.tensor(list(scalars.values())).isfinite().all()
