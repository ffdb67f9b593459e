"""Stochastic depth: decisions of the whole batch, whatever share of it is at hand."""

import copy
import dataclasses

import pytest
import timm
import torch
from timm import layers

from ssl_vit.common.task import Views
from ssl_vit.evaluators.classifier import TimmCall
from ssl_vit.model.architecture import timm_kwargs
from ssl_vit.model.drop_path import DropPath, add_whole, batch_share, factors_of
from ssl_vit.model.encoder import Encoder
from tests.unit.methods.test_dino import ENCODER, batch, dino

IMAGES, KEY = 12, 7
DROPPING = dataclasses.replace(ENCODER, drop_path=0.5)


def rows_of(rows: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    """A share of rows that are listed view by view."""
    size = IMAGES // parts
    views = rows.unflatten(0, (-1, IMAGES))
    return views[:, part * size : (part + 1) * size].flatten(0, 1)


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_a_share_drops_what_the_whole_batch_drops(parts):
    """Of two views; and the second call of a module draws anew, in both alike."""
    module = DropPath(0.4).train()
    x = torch.randn(2 * IMAGES, 3, 5)
    with batch_share(0, 1, IMAGES, KEY):
        whole = [module(x) for _ in range(2)]
    dropped = [(out == 0).all((1, 2)) for out in whole]
    assert not torch.equal(*dropped)
    assert not torch.equal(*dropped[0].chunk(2))
    for part in range(parts):
        torch.manual_seed(part)
        own = rows_of(x, part, parts)
        with batch_share(part, parts, len(own) // 2, KEY):
            for out in whole:
                assert torch.equal(module(own), rows_of(out, part, parts))


@pytest.mark.parametrize("parts", [2, 3])
def test_a_method_learns_the_same_from_a_batch_in_shares(parts):
    """DINO's student, with two crop sizes: loss and gradients are means over shares."""
    method = dino(encoder=DROPPING).double().train()
    views = batch(IMAGES)
    views.crops = [c.double() for c in views.crops]

    def learn(part: int, parts: int) -> float:
        crops = [rows_of(c, part, parts) for c in views.crops]
        n = IMAGES // parts
        with batch_share(part, parts, n, KEY):
            loss = method(Views(crops, views.keys[:n], views.labels[:n]), 0)["loss"]
        (loss / parts).backward()
        return loss.item() / parts

    def gradients() -> dict[str, torch.Tensor]:
        found = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
        method.zero_grad()
        return found

    torch.manual_seed(0)
    whole, expected = learn(0, 1), gradients()
    torch.manual_seed(1)
    assert sum(learn(i, parts) for i in range(parts)) == pytest.approx(whole, rel=1e-10)
    found = gradients()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12, msg=name)


def test_how_often_it_drops():
    """Of 40,000 rows 30 %, within five standard errors; the rest grows to keep the mean."""
    module = DropPath(0.3).train()
    ones = torch.ones(40000, 1)
    seen = []
    for key in (1, 2):
        with batch_share(1, 2, 20000, key):
            seen.append(module(ones))
        assert set(seen[-1].unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.7)}
        assert float((seen[-1] == 0).float().mean()) == pytest.approx(0.3, abs=5 * 0.0023)
    assert not torch.equal(*seen), "another key, other rows"
    unscaled = DropPath(0.3, scale_by_keep=False).train()
    with batch_share(1, 2, 20000, 2):
        assert torch.equal(unscaled(ones), (seen[1] > 0).float())


def test_elsewhere_it_is_timms():
    """Bit for bit; and it leaves torch's generator alone inside of a share."""
    x = torch.randn(IMAGES, 4, dtype=torch.bfloat16)
    outputs = []
    for module in (DropPath(0.4), layers.DropPath(0.4)):
        torch.manual_seed(0)
        outputs.append(module.train()(x))
    assert torch.equal(*outputs)
    torch.manual_seed(0)
    with batch_share(0, 2, IMAGES, KEY):
        assert not torch.equal(DropPath(0.4).train()(x), outputs[0])
        for same in (DropPath(0.4).eval(), DropPath(0.0).train()):
            assert same(x) is x
    assert torch.equal(DropPath(0.4).train()(x), outputs[0])


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 5, 8, 9, 11, 12])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rows_computed_for_nothing_change_nothing(kept, kind, monkeypatch):
    """Sum and gradients are those of the branch of all rows, multiplied; the numbers of rows that
    the branch gets are few."""
    module = DropPath(0.4).train()
    keeps = torch.arange(IMAGES).mul(5).remainder(IMAGES) < kept
    monkeypatch.setattr(module, "draw", lambda rows: keeps)
    seen, found = [], []
    weight = torch.eye(5) / 2
    for add in (True, False):
        to = torch.ones(IMAGES, 3, 5, requires_grad=True)
        x = torch.linspace(-1, 1, IMAGES * 15).view(IMAGES, 3, 5).requires_grad_()
        own = weight.clone().requires_grad_()

        def branch(some, rows, own=own):
            seen.append(len(some))
            assert rows is None or len(rows) == len(some)
            return (some @ own).to(kind)

        out = module.add(to, x, branch) if add else to + module(branch(x, None))
        out.cos().sum().backward()
        found.append([out.detach(), to.grad, x.grad, own.grad])
    exact = 1e-6 if kind == torch.float32 else 5e-2
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=exact, atol=exact)
    assert seen[0] == {0: 0, 1: 3, 3: 3, 4: 6, 5: 6, 8: 9, 9: 9, 11: 12, 12: 12}[kept]
    assert torch.equal(found[0][0][~keeps], torch.ones(IMAGES - kept, 3, 5))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_what_is_computed_whole_is_scaled_exactly(kind):
    """A branch in bfloat16, too, whose own 1 / 0.9 would be 1.109; elsewhere nothing is scaled."""
    module, found = DropPath(0.1).train(), torch.linspace(-1, 1, 500).view(100, 5).to(kind)
    to = torch.ones(100, 5).requires_grad_()
    found.requires_grad_()
    with batch_share(0, 1, 100, KEY):
        keeps = module.draw(100)
    with batch_share(0, 1, 100, KEY):
        factors = module.factors(100)
    out = add_whole(to, found, factors)
    assert 0 < int(keeps.sum()) < 100
    assert torch.equal(out[~keeps], to[~keeps])
    torch.testing.assert_close(out[keeps], to[keeps] + found[keeps].float() / 0.9)
    out.backward(torch.full_like(out, 3.0))
    assert torch.equal(to.grad, torch.full_like(to, 3.0))
    of_found = torch.where(keeps, 3.0 / 0.9, 0.0)[:, None].expand(100, 5).to(kind)
    assert found.grad.dtype == kind
    torch.testing.assert_close(found.grad, of_found, rtol=1e-6, atol=0)
    assert module.eval().factors(100) is None


def test_factors_of_branches_are_their_draws_in_turn():
    """So a block that computes all drops what one drops that draws branch by branch."""
    branches, x = (DropPath(0.3).train(), DropPath(0.6).train()), torch.zeros(50, 2)
    with batch_share(0, 1, 50, KEY):
        drawn = [branch.draw(50) for branch in branches]
    with batch_share(0, 1, 50, KEY):
        factors = factors_of(branches, x)
    for keeps, found, scale in zip(drawn, factors, (1 / 0.7, 1 / 0.4), strict=True):
        torch.testing.assert_close(found, keeps * scale)
    assert factors_of([branch.eval() for branch in branches], x) is None
    assert factors_of([torch.nn.Identity()] * 2, x) is None


def test_nothing_of_a_branch_is_kept_for_its_sum():
    """What stochastic depth itself keeps for backward is which rows it was."""
    kept: list[int] = []
    module, to = DropPath(0.5).train(), torch.zeros(64, 100, requires_grad=True)

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.numel())
        return value

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        module.add(to, to.detach(), lambda some, _: some.requires_grad_())
    assert sum(kept) <= 64


def test_rows_that_are_no_whole_views_are_an_error():
    with batch_share(0, 2, 8, KEY), pytest.raises(AssertionError, match=r"12 rows .* 8 images"):
        DropPath(0.4).train()(torch.zeros(IMAGES, 4))


@pytest.mark.parametrize("arch", ["vit", "convnext_atto"])
def test_every_network_that_is_trained_has_it(arch):
    """Rates and names of weights are timm's."""
    if arch == "vit":
        network = Encoder(DROPPING).vit
        theirs = timm.create_model(
            ENCODER.arch, num_classes=0, drop_path_rate=0.5, **timm_kwargs(DROPPING)
        )
    else:
        network = TimmCall(arch, {"num_classes": 3}).build(0.5, seed=0)
        theirs = timm.create_model(arch, num_classes=3, drop_path_rate=0.5)
    assert network.state_dict().keys() == theirs.state_dict().keys()
    expected = {n: m for n, m in theirs.named_modules() if isinstance(m, layers.DropPath)}
    assert expected
    for name, module in expected.items():
        own = copy.deepcopy(network).get_submodule(name)
        assert type(own) is DropPath
        assert own.drop_prob == module.drop_prob
