"""Training of peers for equal time: from our first encoder, by our schedules, to a file of ours."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from ssl_vit.benchmarks.peer_training import (
    PeerTraining,
    asked_peers,
    chain_of,
    training_peers,
)
from ssl_vit.benchmarks.pipeline import ChainImages
from ssl_vit.common.config import EncoderConfig, OptimConfig, RunConfig
from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.common.reading import DataConfig
from ssl_vit.data.sources import open_source
from ssl_vit.methods.dino import DINO
from ssl_vit.methods.mae import MAE
from ssl_vit.training.optim import Schedule
from ssl_vit.weights.exchange import load_encoder
from tests.unit.benchmarks.test_peers import (
    SINCOS,
    SMALL_DINO,
    SMALL_MAE,
    TINY,
    Arrays,
    image,
    work,
)

STEPS = 6
OPTIM = OptimConfig(
    lr=0.01, warmup="2st", weight_decay=0.1, weight_decay_end=0.3, clip=3.0, batch_size=8
)
DINO_CONFIG = replace(
    SMALL_DINO,
    local_crops=2,
    momentum=0.5,
    freeze_last_layer="3st",
    teacher_temp_warmup="4st",
    teacher_temp_start=0.03,
)
PEERS = [("mae", "original"), ("mae", "lightly")]
PEERS += [("dino", "original"), ("dino", "lightly"), ("dino", "lightly-grouped")]


def training(method: str, name: str, encoder: EncoderConfig | None = None) -> PeerTraining:
    """Training on digits, without workers, in float32."""
    options = SMALL_MAE if method == "mae" else DINO_CONFIG
    encoder = encoder or (SINCOS if method == "mae" else TINY)
    kind = {"mae": MAE, "dino": DINO}[method]
    shared = replace(work(options, encoder, batch=8), optim=OPTIM)
    peer = training_peers(method)[name]
    peer.load()
    torch.manual_seed(3)
    make = partial(kind, options, encoder, 3)
    source = open_source("digits:train", DataConfig(channels=3))
    chain = chain_of(method, name, shared)
    return PeerTraining(shared, peer, chain, source, 0, make, RunConfig())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("method", "name"), PEERS)
def test_a_peer_trains_by_our_schedules(method, name, tmp_path):
    """Rates of every step, what is held at first, and an encoder that gives the peer's features."""
    pytest.importorskip("lightly")
    side = training(method, name)
    first = side.ours.encoder.vit.state_dict()
    for vit in side.side.vits():
        assert all(torch.equal(vit.state_dict()[k], v) for k, v in first.items())
    before = [v.clone() for v in first.values()]
    side.plan(STEPS)
    run = RunConfig(length=f"{STEPS}st")
    expected = Schedule(run, OPTIM, len(side.images.source) // 8, side.ours.peak_in_warmup)
    peer = side.side
    for step in range(STEPS):
        last = peer.last_layer().state_dict() if method == "dino" else {}
        last = {k: v.clone() for k, v in last.items()}
        _, _, loss = side.timed(1)
        assert loss == loss
        decaying, others = peer.optimizer.param_groups
        assert decaying["lr"] == others["lr"] == expected.lr(step)
        assert decaying["weight_decay"] == expected.weight_decay(step)
        assert others["weight_decay"] == 0
        if method == "dino":
            objective = side.ours.objective
            assert peer.momentum == objective.teacher_momentum(step)
            assert peer.teacher_temp == objective.teacher_temp(step)
            now = peer.last_layer().state_dict()
            held = all(torch.equal(now[k], v) for k, v in last.items())
            assert held == (step < 3)
    side.export(tmp_path / "encoder.safetensors", method)
    judged, info = load_encoder(tmp_path / "encoder.safetensors")
    assert (info.method, info.step, info.mean) == (method, STEPS, (0.5,) * 3)
    images = torch.randn(2, 3, 16, 16)
    vit = peer.vits()[-1].eval()
    with torch.no_grad():
        theirs = vit.forward_features(images)
        torch.testing.assert_close(judged.eval()(images).cls, theirs[:, 0], rtol=1e-4, atol=1e-5)
    after = judged.vit.state_dict().values()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_rate_is_that_of_training():
    side = training("mae", "original")
    assert side.rate(0.2, 1) > 0
    assert side.step == 0


def test_an_image_that_cannot_be_read_is_replaced_by_the_next():
    """As our loader goes on, too; in measurements of speed it is an error, found beforehand."""
    source = Arrays([image(), b"", b"broken"])
    chain = chain_of("mae", "original", work(SMALL_MAE, SINCOS))
    images = ChainImages(source, chain, skips=True)
    assert all(images[i][0].shape == (3, 16, 16) for i in range(3))
    with pytest.raises(OSError, match="cannot identify"):
        ChainImages(source, chain)[1]
    with pytest.raises(OSError, match="cannot identify"):
        ChainImages(Arrays([b""] * 3), chain, skips=True)[1]


def test_weights_that_are_not_finite_are_not_judged(tmp_path):
    side = training("mae", "original")
    side.side.vits()[0].norm.weight.data.fill_(float("nan"))
    with pytest.raises(RunFailed, match="not finite"):
        side.export(tmp_path / "encoder.safetensors", "mae")
    assert not list(tmp_path.iterdir())


def test_peers_are_those_whose_encoder_can_be_judged():
    assert asked_peers("none", ["mae"]) == []
    assert asked_peers("original,lightly", ["lejepa", "mae"]) == ["original", "lightly"]
    with pytest.raises(UserError, match=r"'huggingface'; allowed for quality of mae: original, l"):
        asked_peers("huggingface", ["mae"])
    with pytest.raises(UserError, match=r"allowed for quality of lejepa: none"):
        asked_peers("original", ["lejepa"])
