"""Muon: torch's own, its orthogonal matrices, what it trains, and steps that it skips."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit import pretrain
from ssl_vit.common.config import EncoderConfig, OptimConfig
from ssl_vit.common.errors import UserError
from ssl_vit.common.task import Task
from ssl_vit.methods.mae import MAE
from ssl_vit.training.footprint import memory_of
from ssl_vit.training.muon import (
    _AT_ONCE,
    Muon,
    block_matrices,
    orthogonalized,
    orthogonalizing,
)
from ssl_vit.training.optim import guarded_step, make_optimizer, set_rates
from ssl_vit.training.run_files import complete
from tests.contract.test_training import from_the_first_step, outcome
from tests.contract.tiny import arguments, session
from tests.unit.common.test_schedules_optim import give_gradients, state_of

SMALL = EncoderConfig("vit_tiny_patch16_224", (16,), patch_size=4, width=32, depth=2, heads=2)
CONFIG = OptimConfig(name="muon", lr=0.01, weight_decay=0.1)


def small_mae() -> MAE:
    torch.manual_seed(0)
    return MAE(MAE.Config(decoder_depth=1, decoder_width=24, decoder_heads=2), SMALL, 3)


def muon_names(task: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    names = {parameter: name for name, parameter in task.named_parameters()}
    return {names[p] for g in optimizer.param_groups if g["muon"] for p in g["params"]}


@pytest.mark.parametrize("shape", [(48, 48), (48, 192), (192, 48)])
def test_singular_values_come_close_to_one(shape):
    """Of matrices whose singular values differ by a hundred times; left and right stay."""
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(2, *shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(-2, 0, u.shape[-1], dtype=torch.float64)
    found = orthogonalized(u * values @ v)
    new = u.mT @ found @ v.mT
    diagonal = new.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(new, torch.diag_embed(diagonal), rtol=0, atol=1e-9)
    assert float(diagonal.min()) > 0.6
    assert float(diagonal.max()) < 1.25
    assert torch.isfinite(orthogonalized(torch.zeros(1, *shape))).all()


def test_its_flops_are_counted():
    matrices = block_matrices(small_mae())
    with FlopCounterMode(display=False) as counter:
        for matrix in matrices:
            orthogonalized(matrix.detach()[None])
    assert counter.get_total_flops() == orthogonalizing(matrices) > 0


def test_it_trains_the_matrices_of_blocks():
    """Of encoder and decoder: neither patches, heads, positions nor tokens; no vectors."""
    task = small_mae()
    optimizer = make_optimizer(task, CONFIG)
    blocks = ("encoder.vit.blocks.0", "encoder.vit.blocks.1", "objectives.mae.decoder.blocks.0")
    inner = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    found = muon_names(task, optimizer)
    assert {n for n in found if n.startswith("encoder")} == {
        f"{block}.{layer}.weight" for block in blocks[:2] for layer in inner
    }
    assert len(found) == 12
    assert all(".blocks." in name and name.endswith(".weight") for name in found)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == sum(p.requires_grad for p in task.parameters())
    assert not muon_names(task, make_optimizer(task, OptimConfig()))


@pytest.mark.parametrize("at_once", [_AT_ONCE, 1])
def test_steps_are_torchs_own(monkeypatch, at_once):
    """Those of ``torch.optim.Muon`` and ``AdamW``, together or one matrix after the other."""
    monkeypatch.setattr("ssl_vit.training.muon._AT_ONCE", at_once)
    task, reference = small_mae(), small_mae()
    optimizer = make_optimizer(task, CONFIG, torch.bfloat16)
    names = muon_names(task, optimizer)
    own = dict(reference.named_parameters())
    decays = {n for n, p in own.items() if task.decays(n, p)} - names
    rest = {n for n, p in own.items() if p.requires_grad} - names - decays
    theirs = [
        torch.optim.Muon(
            [own[n] for n in sorted(names)],
            lr=0.01,
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW([own[n] for n in sorted(decays)], lr=0.01, weight_decay=0.1),
        torch.optim.AdamW([own[n] for n in sorted(rest)], lr=0.01, weight_decay=0.0),
    ]
    for step in range(3):
        for model in (task, reference):
            give_gradients(model, step)
        guarded_step(optimizer, torch.tensor(True))
        for peer in theirs:
            peer.step()
    for name, parameter in task.named_parameters():
        # Both multiply in bfloat16; sums over matrices that are stacked are in another order.
        atol = 2e-4 if name in names else 1e-6
        torch.testing.assert_close(parameter, own[name], rtol=0, atol=atol, msg=name)
        if name in names:
            moved = optimizer.state[parameter]["momentum_buffer"]
            torch.testing.assert_close(moved, theirs[0].state[own[name]]["momentum_buffer"])


def test_rates_and_decay_are_the_groups():
    """At rate 0 nothing moves; without a gradient a matrix neither moves nor decays."""
    task = small_mae()
    optimizer = make_optimizer(task, CONFIG)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    set_rates(optimizer, 0.0, 0.1)
    give_gradients(task, 0)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in task.named_parameters())
    still = task.encoder.vit.blocks[0].mlp.fc1.weight
    still.grad = None
    set_rates(optimizer, 0.01, 0.1)
    optimizer.step()
    assert torch.equal(still, before["encoder.vit.blocks.0.mlp.fc1.weight"])
    moved = task.encoder.vit.blocks[1].mlp.fc1.weight
    change = moved.detach() - before["encoder.vit.blocks.1.mlp.fc1.weight"] * (1 - 0.01 * 0.1)
    # The size of AdamW's: at most the rate, of which Muon's root mean square is a fifth.
    assert float(change.square().mean().sqrt()) == pytest.approx(0.01 * 0.2, rel=0.3)


@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(bad_step):
    """Neither weights nor momentum, at first and later."""
    task, reference = small_mae(), small_mae()
    optimizer, plain = make_optimizer(task, CONFIG), make_optimizer(reference, CONFIG)
    for step in range(4):
        if step == bad_step:
            before = state_of(task, optimizer)
            give_gradients(task, 99, scale=math.nan)
            guarded_step(optimizer, torch.tensor(False))
            after = state_of(task, optimizer)
            before += [torch.zeros_like(v) for v in after[len(before) :]]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for model, made in ((task, optimizer), (reference, plain)):
            give_gradients(model, step)
            guarded_step(made, torch.tensor(True))
    for a, b in zip(state_of(task, optimizer), state_of(reference, plain), strict=True):
        assert torch.equal(a, b)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UserError, match=r"--optim.name is 'muon'.*give adamw"):
        make_optimizer(Layers(), CONFIG)


class Layers(Task):
    """A task that has no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)


def test_the_option_reaches_the_trainer():
    """And is said; an encoder that is frozen at first has its momentum counted as it will be."""
    frozen = ("--optim.freeze-encoder", "2st")
    made, plain = (session("mae", "--optim.name", n, *frozen) for n in ("muon", "adamw"))
    optimizer = made.trainer.optimizer
    assert isinstance(optimizer, Muon)
    assert not optimizer.half
    assert not isinstance(plain.trainer.optimizer, Muon)
    count = sum(p.numel() for p in block_matrices(made.task))
    every = sum(p.numel() for p in made.trainer.trained)
    said = dict(made.plan([]))["optimizer"]
    assert f"{len(block_matrices(made.task))} matrices of blocks, {count / every:.0%} of" in said
    assert "optimizer" not in dict(plain.plan([]))
    less = memory_of(plain.trainer, 0.0).moments - memory_of(made.trainer, 0.0).moments
    assert less == 4 * count


def test_a_run_goes_on_to_the_bit(tmp_path):
    one, two = from_the_first_step("mae", tmp_path, "--optim.name", "muon")
    assert outcome(one) == outcome(two)
    other = ("--run.resume", str(complete(one / "checkpoints")[0]), "--run.out", f"{tmp_path}/3")
    with pytest.raises(UserError, match=r"was trained by another --optim\.name"):
        pretrain.main(arguments("mae", *other))
