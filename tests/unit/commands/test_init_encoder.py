"""Pretraining that begins with given weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_vit.commands.initial_weights import initial_method
from ssl_vit.commands.pretraining import build
from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.methods.base import find_method
from ssl_vit.model.encoder import Encoder
from ssl_vit.pretrain import parse_options
from ssl_vit.training.resume import files_alike
from ssl_vit.weights.exchange import EncoderInfo, save_encoder

CONFIG = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(8,), patch_size=2, width=32, depth=2, heads=2
)
DINO = ("--method.prototypes", "16", "--method.head-width", "16", "--method.bottleneck", "8")


@pytest.fixture
def given(tmp_path: Path) -> tuple[Path, Encoder]:
    """An encoder file of images with two channels, learned positions."""
    torch.manual_seed(5)
    encoder = Encoder(CONFIG, 2)
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.1)
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, EncoderInfo(CONFIG, 2, (0.1, 0.2), (0.3, 0.4)))
    return path, encoder


def read(argv):
    """The method's class and the options of a command line."""
    name, config = parse_options(argv)
    return find_method(name), config


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_every_encoder_of_a_method_begins_with_the_weights(name, given):
    path, encoder = given
    more = DINO if name == "dino" else ()
    kind, config = read([name, "--data.train", "digits", "--init.encoder", str(path), *more])
    method = initial_method(kind, config)
    encoders = [m for m in method.modules() if isinstance(m, Encoder)]
    assert len(encoders) == (2 if name == "dino" else 1)
    for found in encoders:
        for key, value in encoder.vit.state_dict().items():
            assert torch.equal(found.vit.state_dict()[key], value), key


def test_architecture_channels_and_statistics_come_with_the_weights(given):
    path, _ = given
    _, config = parse_options(["mae", "--data.train", "digits", "--init.encoder", str(path)])
    assert replace(config.encoder, drop_path=0.0) == CONFIG
    assert (config.data.channels, config.data.mean, config.data.std) == (2, (0.1, 0.2), (0.3, 0.4))
    flags = ["dino", "--data.train", "digits", "--init.encoder", str(path)]
    assert parse_options([*flags, *DINO])[1].encoder.drop_path == 0.1  # the method's own


def test_given_weights_are_spared_by_default(given):
    """Which is said before the first step; a value of the user's own, in a file or not, wins."""
    path, _ = given
    flags = ["mae", "--data.train", folder_of(path.parent / "images", 2), "--run.length", "20st"]
    flags += ["--optim.batch-size", "4"]
    plain = build(*parse_options([*flags, "--data.channels", "2"]))
    assert plain.trainer.schedule.frozen == 0
    assert "encoder's rate" not in dict(plain.plan([]))
    flags += ["--init.encoder", str(path)]
    spared = build(*parse_options(flags))
    assert dict(spared.plan([]))["encoder's rate"] == (
        "frozen for 2 steps; rises from 0 to its own over 2; x 0.1; less from block to block, "
        "x 0.9; patch embedding x 0.2"
    )
    own = path.with_name("own.yaml")
    own.write_text("optim: {encoder_lr: 1.0, freeze_encoder: 1st}")
    optim = parse_options([*flags, "--config", str(own), "--optim.release", "0st"])[1].optim
    assert (optim.encoder_lr, optim.freeze_encoder, optim.release) == (1.0, "1st", "0st")
    assert (optim.layer_decay, optim.patch_lr) == (0.9, 0.2)
    whole = parse_options([*flags, "--init.heads", "True"])[1]
    assert whole.optim == plain.config.optim, "heads that come with the encoder do not ruin it"


def test_a_run_knows_the_file_it_began_with_wherever_it_is(given):
    """What a run that goes on compares: the same file in another place, and another one."""
    path, encoder = given
    copy = path.with_name("copy.safetensors")
    copy.write_bytes(path.read_bytes())
    other = path.with_name("other.safetensors")
    save_encoder(other, encoder, EncoderInfo(CONFIG, 2, (0.5, 0.2), (0.3, 0.4)))
    place = path.parent / "images"
    place.mkdir()
    np.save(place / "a.npy", np.arange(128, dtype=np.uint8).reshape(8, 8, 2))
    data = ("--data.train", f"flat:{place}", "--data.holdout", "0", "--optim.batch-size", "1")
    runs = []
    for file in (path, copy, other):
        flags = ["mae", *data, "--init.encoder", str(file), "--run.out", "run"]
        runs.append(build(*parse_options(flags)).fingerprint)
    first, same, another = runs
    assert files_alike(same, first) == {"data.train": True, "init.encoder": True}
    assert files_alike(another, first) == {"data.train": True, "init.encoder": False}


def test_another_image_size_resamples_the_positions(given):
    path, encoder = given
    flags = ["mae", "--data.train", "digits", "--init.encoder", str(path)]
    kind, config = read([*flags, "--encoder.image-size", "16"])
    method = initial_method(kind, config)
    made = method.encoder.vit.pos_embed
    assert made.shape[1] == 1 + 64
    wanted = torch.cat([p for p in encoder.positions((8, 8)) if p is not None], dim=1)
    torch.testing.assert_close(made, wanted)


def test_weights_that_do_not_fit_are_named(given):
    path, _ = given
    flags = ["mae", "--data.train", "digits", "--init.encoder", str(path)]
    kind, config = read([*flags, "--encoder.depth", "3"])
    with pytest.raises(UserError, match=r"--init.encoder .*missing \(blocks.2"):
        initial_method(kind, config)
    with pytest.raises(UserError, match="nowhere"):
        parse_options(["mae", "--data.train", "digits", "--init.encoder", "nowhere"])


def test_without_it_nothing_changes():
    flags = ["mae", "--data.train", "digits", "--encoder.depth", "1"]
    kind, config = read(flags)
    assert config.init.encoder == ""
    assert kind is find_method("mae")


def folder_of(path: Path, channels: int, kind: str = "f4") -> str:
    """Images of these channels, of mean 2000 and deviation 300."""
    path.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        np.save(path / f"{i}.npy", rng.normal(2000, 300, (8, 8, channels)).astype(kind))
    return f"flat:{path}"


def test_statistics_of_the_images_are_estimated_where_that_is_asked(given, tmp_path):
    """Where it is not, they are the encoder's, with a warning that names the remedy."""
    path, _ = given
    flags = ["mae", "--data.train", folder_of(tmp_path / "2", 2), "--init.encoder", str(path)]
    flags += ["--optim.batch-size", "4"]
    kept, own = (build(*parse_options([*flags, *m])) for m in ((), ("--data.statistics", "auto")))
    assert kept.images.mean == (0.1, 0.2)
    assert f"those of --init.encoder {path}" in dict(kept.plan([]))["normalised by"]
    assert kept.images.warnings[0].endswith("give --data.statistics auto")
    assert own.images.mean == pytest.approx((2000, 2000), rel=0.01)
    assert own.images.warnings == ()
    assert own.info().mean == own.images.mean


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_other_channels_name_the_option(given, tmp_path, channels):
    """Never --data.mean, which nobody gave."""
    path, _ = given
    spec = folder_of(tmp_path / "other", channels)
    flags = ["mae", "--data.train", spec, "--init.encoder", str(path)]
    message = (
        f"have {channels} channels?; --init.encoder .* takes images of 2: give --data.channels "
        f"{channels} to adapt it"
    )
    with pytest.raises(UserError, match=message):
        build(*parse_options(flags))
    with pytest.raises(UserError, match=f"--data.channels is 5: give --data.channels {channels}$"):
        build(*parse_options([*flags, "--data.channels", "5"]))


@pytest.mark.parametrize("channels", [1, 5])
def test_weights_for_other_channels(given, tmp_path, channels, caplog):
    """Filters are adapted, which is said; statistics are those of the images."""
    path, encoder = given
    spec = folder_of(tmp_path / "other", channels)
    flags = ["mae", "--data.train", spec, "--init.encoder", str(path), "--optim.batch-size", "4"]
    caplog.set_level("INFO")
    session = build(*parse_options([*flags, "--data.channels", f"{channels}"]))
    vit, own = session.task.encoder.vit, encoder.vit
    filters, old = vit.patch_embed.proj.weight, own.patch_embed.proj.weight
    torch.testing.assert_close(filters[:, -1], old.mean(1) * 2 / channels)
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, own.blocks[1].mlp.fc1.weight)
    names = "mean" if channels == 1 else "0, 1, 3 x mean"
    many = "channel" if channels == 1 else "channels"
    assert f"; filters of {channels} {many}: {names}, all times 2/{channels}" in caplog.text
    assert session.images.mean == pytest.approx((2000,) * channels, rel=0.01)
    assert "estimated from" in dict(session.plan([]))["normalised by"]


def test_filters_by_name(given):
    path, encoder = given
    flags = ["mae", "--data.train", "digits", "--init.encoder", str(path), "--data.channels", "3"]
    kind, config = read([*flags, "--init.channels", "1,0,mean"])
    filters = initial_method(kind, config).encoder.vit.patch_embed.proj.weight
    old = encoder.vit.patch_embed.proj.weight
    expected = torch.stack([old[:, 1], old[:, 0], old.mean(1)], 1) * 2 / 3
    torch.testing.assert_close(filters, expected)
    kind, config = read([*flags, "--init.channels", "1,0"])
    with pytest.raises(UserError, match=r"filters '1,0' are 2; --data.channels is 3"):
        initial_method(kind, config)


def test_another_patch_size_resizes_the_filters(given, caplog):
    path, _ = given
    flags = ["mae", "--data.train", "digits", "--init.encoder", str(path)]
    caplog.set_level("INFO")
    kind, config = read([*flags, "--encoder.patch-size", "4"])
    vit = initial_method(kind, config).encoder.vit
    assert vit.patch_embed.proj.weight.shape == (32, 2, 4, 4)
    assert vit.pos_embed.shape == (1, 1 + 4, 32)
    assert "; filters of 2 pixels are resized to patches of 4 by pseudo-inverse" in caplog.text


def test_all_weights_need_a_run_of_the_method(given, tmp_path):
    """An encoder file alone has no heads; neither has what is no run."""
    path, _ = given
    flags = ["dino", "--data.train", "digits", "--init.encoder", str(path), *DINO]
    kind, config = read([*flags, "--init.heads", "True"])
    said = f"--init.heads True: {tmp_path} is no run folder of pretrain dino with checkpoints"
    with pytest.raises(UserError) as error:
        initial_method(kind, config)
    assert str(error.value).startswith(said)
    with pytest.raises(UserError, match=r"--init\.heads is True; it needs --init\.encoder RUN"):
        parse_options(["dino", "--init.heads", "True"])


def test_a_file_that_is_not_there_is_named_with_its_option():
    with pytest.raises(UserError, match=r"--init\.encoder is 'nowhere'; no such file"):
        parse_options(["mae", "--data.train", "digits", "--init.encoder", "nowhere"])
