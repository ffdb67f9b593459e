"""Augmentation presets of named methods: what wins over each, and what is said of it."""

import hashlib
import random
from typing import get_args, get_type_hints

import pytest

from ssl_vit.benchmarks.chains import OriginalChain
from ssl_vit.commands.cli import layered
from ssl_vit.commands.pretrain_options import PretrainConfig
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.layers import to_yaml
from ssl_vit.common.presets import _PRESETS, about_preset, preset_values
from ssl_vit.common.reading import DataConfig
from ssl_vit.data.augment import Crop, ViewSpec, draw_views
from ssl_vit.data.description import described, far_from_black
from ssl_vit.data.photometric import Photometric
from ssl_vit.evaluators.finetune import tuning_views
from ssl_vit.evaluators.options import FinetuneConfig
from ssl_vit.methods.base import find_method
from ssl_vit.model.encoder import Encoder
from ssl_vit.pretrain import parse_options
from tests.contract import tiny

# Of everything that is drawn for crops by each method's defaults, as it was before presets.
NATURAL = {
    "dino": "ec8a367bf0162c54",
    "dinov2": "343fcc76402aa733",
    "ibot": "4d760843b22cfb81",
    "lejepa": "4777b3e80bc368b4",
    "mae": "61a35c5b4e10aead",
    "mae_dino": "912b42a1d5151ce6",
    "simmim": "618e6ce350ffbf17",
    "ijepa": "bb69a2fc516694a5",
}
# Methods whose views are compared, or that have colour jitter.
COMPARED = {"dino", "dinov2", "ibot", "lejepa", "mae_dino", "distill"}


def parsed(name: str, *flags: str) -> PretrainConfig:
    return parse_options([name, "--data.train", "digits", *flags])[1]


def views(name: str, config: PretrainConfig) -> ViewSpec:
    kind = find_method(name)
    return kind.views(config.method, Encoder(config.encoder, config.data.channels))


# --- what they are ------------------------------------------------------------------------------


def test_the_option_allows_those_that_there_are():
    assert get_args(get_type_hints(DataConfig)["preset"]) == tuple(_PRESETS)


@pytest.mark.parametrize("name", NATURAL)
def test_by_default_every_draw_is_as_it_was_before_presets(name):
    """Boxes, flips, photometric parameters, and where the generator is left."""
    kind = find_method(name)
    shape = EncoderConfig("vit_tiny_patch16_224", image_size=(32, 48), patch_size=8, depth=1)
    spec, digest = kind.views(kind.Config(), Encoder(shape, 3)), hashlib.sha256()
    for seed in range(20):
        rng = random.Random(seed)
        drawn_cuts = draw_views(37, 61, spec, rng, policies=True)
        for cut in (cut for kind_of_crop in drawn_cuts for cut in kind_of_crop):
            drawn = [round(v, 6) for v in cut.photometric]
            digest.update(repr((cut.box, cut.flip, cut.key, drawn, cut.vertical_flip)).encode())
            assert cut.turns == 0
        digest.update(repr(round(rng.random(), 6)).encode())
    assert digest.hexdigest()[:16] == NATURAL[name]


@pytest.mark.parametrize("name", [*NATURAL, "distill"])
def test_each_has_the_options_that_presets_set(name):
    """All have geometry; those that compare views, or have colour jitter, have levels, too."""
    config = find_method(name).Config()
    has = {option.name for option in tiny.method_options(config)}
    assert {"flip", "vertical_flip", "quarter_turns"} <= has
    levels = {"levels", "channel_levels"}
    assert has & levels == (levels if name in COMPARED else set())


@pytest.mark.parametrize("name", ["dino", "lejepa", "mae_dino"])
def test_a_medical_image_keeps_left_right_and_up(name):
    for crop in views(name, parsed(name, "--data.preset", "medical", "--data.channels", "1")).crops:
        assert (crop.flip, crop.vertical_flip, crop.quarter_turns) == (0.0, 0.0, 0.0)
        if (p := crop.photometric) is not None:
            assert (p.jitter, p.gray, p.blur, p.solarize) == (0.0, 0.0, 0.0, 0.0)
            assert crop.levels is not None
            assert (crop.levels.together, crop.levels.noise) == (0.8, 0.1)


def test_hue_is_for_three_channels():
    """An aerial image of other channels has levels in place of colour jitter."""
    assert "jitter" not in preset_values("aerial", 3)
    assert preset_values("aerial", 13)["jitter"] == 0
    assert preset_values("aerial", 13)["levels"] > 0


# --- layers -------------------------------------------------------------------------------------


def test_the_command_line_and_files_win_over_a_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {preset: microscopy}\nmethod: {quarter_turns: 0.25}\n")
    config = parsed("lejepa", "--config", str(path), "--method.flip", "0")
    method = config.method
    assert (method.flip, method.vertical_flip, method.quarter_turns) == (0.0, 0.5, 0.25)
    assert (method.jitter, method.channel_levels, method.levels) == (0.0, 0.8, 0.0)
    assert about_preset(config) == (
        "microscopy but for --method.flip 0, --method.quarter-turns 0.25"
    )
    other = parsed("lejepa", "--config", str(path), "--data.preset", "natural")
    assert (other.method.jitter, other.method.vertical_flip) == (0.8, 0.0)


def test_a_group_within_a_method_has_its_own():
    config = parsed("mae_dino", "--data.preset", "medical", "--method.dino.blur", "0", "0", "1")
    assert (config.method.mae.flip, config.method.dino.flip) == (0.0, 0.0)
    assert config.method.dino.levels == 0.8
    assert about_preset(config) == "medical but for --method.dino.blur 0 0 1"


def test_a_runs_own_file_reads_back_to_the_same(tmp_path):
    config = parsed("dino", "--data.preset", "gray", "--method.levels", "0.5", "--run.out", "a")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    again = parse_options(["dino", "--config", str(path)])[1]
    assert to_yaml(again) == to_yaml(config)


def test_fine_tuning_takes_flips_and_turns():
    flags = ["--data.preset", "aerial", "--tune.flip", "0.25"]
    config = layered(FinetuneConfig(), [], flags, "prog", "", FinetuneConfig)
    tune, before = config.tune, FinetuneConfig().tune
    assert (tune.flip, tune.vertical_flip, tune.quarter_turns) == (0.25, 0.5, 0.75)
    assert (tune.randaugment, tune.erasing) == (before.randaugment, before.erasing)
    (crop,) = tuning_views(tune, (8, 8), (0.5,)).crops
    assert (crop.flip, crop.vertical_flip, crop.quarter_turns) == (0.25, 0.5, 0.75)
    assert about_preset(config) == "aerial but for --tune.flip 0.25"


# --- what is said -------------------------------------------------------------------------------


def test_the_table_says_what_is_on_and_what_cannot_be():
    """The recipe's flip and jitter win, which is said; of one channel none can be dropped."""
    made = tiny.session("dino", "--data.preset", "microscopy", "--method.blur", "1", "0", "0.5")
    rows = dict(made.plan([]))
    assert rows["preset"] == (
        "microscopy but for --method.flip 0, --method.jitter 0.4: vertical flip 0.5, quarter turns "
        "0.75, colour jitter 0.4, blur 1 / 0, levels of each channel 0.8, channels dropped 0.1"
    )
    assert rows["views"].endswith("left out: saturation, hue, dropping channels")
    assert about_preset(parsed("mae", "--data.preset", "gray")).endswith(
        "sets none of the options here"
    )
    plain = dict(tiny.session("mae").plan([]))
    assert plain["preset"] == f"natural: {described(tiny.session('mae').views)}"


def test_crops_without_any_operation_are_said_to_be_alone():
    assert described(ViewSpec((Crop((8, 8), flip=0.0),))) == "crops alone"


def test_colour_jitter_of_values_far_from_zero_is_warned_of():
    """Kelvin: 40 % of 280 are seven deviations of 15; photographs are less than one from black."""
    spec = ViewSpec((Crop((8, 8), photometric=Photometric(jitter=0.8)),))
    (line,) = far_from_black(spec, (280.0,), (15.0,))
    assert "by up to 40 %" in line
    assert "7.47 deviations" in line
    assert far_from_black(spec, (0.485,), (0.229,)) == []
    calm = ViewSpec((Crop((8, 8), photometric=Photometric(blur=1.0)), Crop((8, 8))))
    assert far_from_black(calm, (280.0,), (15.0,)) == []


def test_a_peer_without_these_operations_is_refused():
    for crop in views("lejepa", parsed("lejepa", "--data.preset", "aerial")).crops[:1]:
        with pytest.raises(UserError, match="--against original turns no crops"):
            OriginalChain(ViewSpec((crop,)), 3, (0.5,) * 3, (0.5,) * 3)
