"""What a benchmark says of a step beside its speed: operations, matrix products, parts, memory."""

import mmap
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.benchmarks import matmul_peak as peaks
from ssl_vit.benchmarks.breakdown import AFTER, DEVICE, FORWARD, STAGES, TRANSFER, WAITING
from ssl_vit.benchmarks.comparison import ratios, shares, time_in_turn
from ssl_vit.benchmarks.our_step import OurStep
from ssl_vit.benchmarks.own_process import OwnProcess
from ssl_vit.benchmarks.peers_dino import OriginalDINO
from ssl_vit.benchmarks.peers_mae import OriginalMAE
from ssl_vit.benchmarks.side import PeakMemory
from ssl_vit.benchmarks.speed import random_batch, trainer_midway
from ssl_vit.benchmarks.step import StepComparison
from ssl_vit.common.config import RunConfig
from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods import method_of
from ssl_vit.methods.base import find_method
from ssl_vit.methods.dino import DINO
from ssl_vit.methods.mae import MAE
from ssl_vit.model import linear
from ssl_vit.model.execution import checkpoint_activations, choose_attention
from ssl_vit.objectives import row_blocks
from ssl_vit.pretrain import parse_options
from ssl_vit.training import clipping
from ssl_vit.training.footprint import flop_counter, measure_step
from tests.conftest import ROOT
from tests.unit.answers import Answers
from tests.unit.benchmarks.test_peers import SINCOS, SMALL_DINO, SMALL_MAE, TINY, work

# (width, depth) of TINY's encoder, pixels of a patch, and the patches of a crop.
D, DEPTH, PIXELS, N, N_LOCAL, BATCH = 16, 2, 4 * 4 * 3, 16, 4, 2


def blocks(tokens: int, width: int, depth: int) -> int:
    """Operations of transformer blocks, forward: 12 w^2 weights a token, and the attention."""
    return depth * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)


def plain(peer, *stacks):
    """With attention as matrix products: a fused one computes part of it again in backward."""
    for stack in stacks:
        for block in stack:
            block.attn.fused_attn = False
    return peer


def test_the_originals_mae_costs_what_its_description_says():
    peer = OriginalMAE(work(SMALL_MAE, SINCOS, BATCH))
    plain(peer, peer.networks.vit.blocks, peer.networks.blocks)
    kept, width = 4 + 1, 12
    embed = 2 * N * PIXELS * D
    rest = blocks(kept, D, DEPTH) + 2 * kept * D * width + blocks(N + 1, width, 2)
    rest += 2 * (N + 1) * width * PIXELS
    # Backward is twice the forward pass, but for the images, which want no gradient.
    assert peer.flops() == BATCH * (2 * embed + 3 * rest)


def test_the_originals_dino_costs_what_its_description_says():
    peer = OriginalDINO(work(SMALL_DINO, TINY, BATCH))

    def forward(crops, patches):
        head = 2 * (D * 12 + 12 * 12 + 12 * 8 + 8 * 24)
        return crops * 2 * patches * PIXELS * D, crops * (blocks(patches + 1, D, DEPTH) + head)

    (embed, rest), (local_embed, local_rest) = forward(2, N), forward(3, N_LOCAL)
    student = 2 * (embed + local_embed) + 3 * (rest + local_rest)
    assert peer.flops() == BATCH * (student + embed + rest)


@pytest.fixture(scope="module", params=["mae", "dino"])
def ours(request):
    """Our step, of each method; DINO's with stochastic depth."""
    if request.param == "mae":
        shared, kind = work(SMALL_MAE, SINCOS, BATCH), MAE
    else:
        shared, kind = work(SMALL_DINO, replace(TINY, drop_path=0.3), BATCH), DINO
    make = lambda: kind(shared.method, shared.encoder, 3)  # noqa: E731
    return OurStep.build(shared, make, RunConfig())


@pytest.mark.parametrize(("device", "steps"), [("cpu", 1), ("cuda", 8)])
def test_the_host_runs_ahead_of_a_device_in_a_repeat(device, steps):
    shared = replace(work(SMALL_MAE, SINCOS, BATCH), device=torch.device(device))
    made = StepComparison("mae", shared, lambda: None, SimpleNamespace(against="none"))
    assert made.steps == steps


def test_our_views_are_ready_as_the_peers_are(ours):
    """Normalised, on the device, before what is timed; they are not, where the parts of a step are
    told apart, nor on the way from a loader."""
    assert all(crop.dtype == torch.float32 for crop in ours.batch.views.crops)
    before = [crop.clone() for crop in ours.batch.views.crops]
    seen = []
    hook = ours.trainer.normalize.register_forward_hook(lambda *_: seen.append(1))
    ours.step()
    assert not seen
    assert all(torch.equal(*pair) for pair in zip(before, ours.batch.views.crops, strict=True))
    ours.breakdown(1)
    assert len(seen) == 1
    hook.remove()


@pytest.mark.parametrize("kernel", ["flash_attention", "efficient_attention", "cudnn_attention"])
def test_fused_attention_of_gpus_counts_as_its_definition(kernel):
    """What its backward pass computes again is no work of the model."""
    q = torch.empty(2, 3, 5, 8, device="meta", dtype=torch.bfloat16)
    lse, scalar = torch.empty(2, 3, 5, device="meta"), torch.empty((), device="meta")
    name, ops = f"_scaled_dot_product_{kernel}", torch.ops.aten
    more = () if kernel == "flash_attention" else (None, True)
    products = 2 * 2 * 3 * 5 * 5 * 8
    with flop_counter() as counter:
        getattr(ops, name)(q, q, q, *more)
    assert counter.get_total_flops() == 2 * products
    tail = {
        "flash_attention": (q, lse, None, None, 5, 5, 0.0, False, scalar, scalar),
        "efficient_attention": (None, q, lse, scalar, scalar, 0.0, [True, True, True, False]),
        "cudnn_attention": (q, lse, scalar, scalar, None, None, None, 5, 5, 0.0, False),
    }[kernel]
    with flop_counter() as counter:
        getattr(ops, f"{name}_backward")(q, q, q, q, *tail)
    assert counter.get_total_flops() == 4 * products


def test_the_products_of_our_step_are_all_its_operations(ours):
    """Nothing is counted that is no matrix product of the shapes that are timed, on a CPU; what
    stochastic depth spares is not counted as done."""
    most = measure_step(ours.trainer, [ours.batch])[0]
    assert sum(peaks.flops(shape) * n for shape, n in ours.products().items()) == most
    is_mae = isinstance(ours.trainer.task, MAE)
    assert 0 < ours.flops() <= most <= (OriginalMAE if is_mae else OriginalDINO)(ours.work).flops()
    assert is_mae == (ours.flops() == most)
    checkpoint_activations(ours.trainer.task)
    assert ours.flops() <= most


def test_the_peak_is_that_of_the_steps_largest_linear_layers(ours, monkeypatch):
    shapes = ours.products()
    linear = {s: peaks.flops(s) * n for s, n in shapes.items() if s[0] == 1}
    asked, rates = [], iter(range(1, 100))
    monkeypatch.setattr(peaks, "_rate", lambda s, *_: asked.append(s) or float(next(rates)))
    monkeypatch.setattr(peaks, "_MOST", 3)
    found = peaks.matmul_peak(shapes, torch.device("cpu"), torch.bfloat16)
    assert len(asked) == 3
    assert min(linear[s] for s in asked) >= max(v for s, v in linear.items() if s not in asked)
    assert found["flops_per_second"] == 3.0
    assert found["shape"] == list(asked[-1][1:])
    assert found["rates"] == [[*s[1:], i + 1.0] for i, s in enumerate(asked)]
    products = sum(peaks.flops(s) * n for s, n in shapes.items())
    assert found["share_of_products"] == sum(linear[s] for s in asked) / products
    assert peaks.better(found, {"flops_per_second": 4.0})["flops_per_second"] == 4.0


def test_a_rate_is_operations_over_seconds(monkeypatch):
    calls = []

    def seconds(call, times, device):
        call()
        calls.append(times)
        return 0.01 * times

    monkeypatch.setattr(peaks, "_seconds", seconds)
    shape = (1, 2, 3, 4)
    rate = peaks._rate(shape, torch.device("cpu"), torch.bfloat16)
    assert rate == pytest.approx(2 * 2 * 3 * 4 / 0.01)
    assert calls[-1] == 5  # that many fill the time
    nothing = peaks.matmul_peak(Counter(), torch.device("cpu"), torch.float32)
    assert nothing["flops_per_second"] is None


def test_the_parts_of_a_step_are_all_of_it(ours):
    step, hooks = ours.trainer.step, len(ours.trainer.model._forward_hooks)
    parts = ours.breakdown(2)
    dino = isinstance(ours.trainer.task, DINO)
    assert list(parts) == [p for p in STAGES if p != WAITING and (dino or p != AFTER)]
    assert all(seconds > 0 for seconds in parts.values())
    # What was watched is as before, and two steps have been taken.
    assert ours.trainer.step == step + 2
    assert len(ours.trainer.model._forward_hooks) == hooks
    assert "before_update" not in vars(ours.trainer.task)
    table = shares(parts)
    assert sum(p["share"] for p in table["parts"].values()) == pytest.approx(1)
    assert table["seconds"] == pytest.approx(sum(parts.values()))


def test_each_part_has_the_seconds_that_are_spent_in_it(ours, monkeypatch):
    """A clock that moves only inside a part says which part it was."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def slow(owner, name, seconds):
        method = getattr(owner, name)

        def slowed(*args, **kwargs):
            clock[0] += seconds
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, slowed)

    slow(ours.trainer.normalize, "forward", 1.0)
    slow(ours.trainer.task, "forward", 2.0)
    slow(ours.trainer.optimizer, "step", 4.0)
    slow(type(ours.batch.views), "to", 8.0)
    slow(ours.trainer.optimizer, "zero_grad", 16.0)
    slow(torch.Tensor, "backward", 32.0)
    parts = ours.breakdown(2)
    known = {DEVICE: 1.0, FORWARD: 2.0, "clipping and optimizer": 4.0, TRANSFER: 8.0}
    known |= {"the rest": 16.0, "backward": 32.0}
    assert {p: s for p, s in parts.items() if s} == known


def test_the_peak_of_memory_is_above_what_was_there():
    memory = PeakMemory(torch.device("cpu"))
    if memory.before is None:
        pytest.skip("this system does not tell")
    memory.begin()
    before = memory.most()
    # 256 MiB straight from the system: the C library may keep what it is given back.
    with mmap.mmap(-1, 2**28) as block:
        for page in range(0, 2**28, mmap.PAGESIZE):
            block[page] = 1
    # It is gone again, and still was the peak; until that is forgotten.
    assert memory.most() - before > 2**27
    memory.begin()
    assert memory.most() - before < 2**27


def test_ratios_are_ours_over_theirs():
    results = {
        "ours": {"images_per_second": 6.0, "peak_memory_bytes": 10},
        "a": {"images_per_second": 2.0, "peak_memory_bytes": 5},
        "b": {"images_per_second": 12.0, "peak_memory_bytes": None},
    }
    assert ratios(results, "images_per_second") == {"ours / a": 3.0, "ours / b": 0.5}
    assert ratios(results, "peak_memory_bytes") == {"ours / a": 2.0, "ours / b": None}


class Recorded(OwnProcess):
    """A side whose steps take a second each, and waits for half of it."""

    def __init__(self, name, calls, losses):
        self.name, self.calls, self.losses = name, calls, iter(losses)

    def ask(self, method, steps):
        self.calls.append((self.name, method, steps))
        return float(steps), steps / 2, next(self.losses)


def test_sides_are_timed_in_turn_with_a_lead_in_that_does_not_count():
    calls = []
    sides = {name: Recorded(name, calls, [9.0, 3.0, 9.0, 2.0]) for name in ("ours", "peer")}
    timings = time_in_turn(sides, batch_size=4, repeats=2, steps=5, lead_in=3)
    turn = [(name, "timed", steps) for name in ("ours", "peer") for steps in (3, 5)]
    assert calls == turn * 2
    for timing in timings.values():
        assert timing.speed.seconds == [5.0, 5.0]
        assert timing.speed.rate == 4.0
        assert (timing.waited, timing.last_loss) == (5.0, 2.0)


def test_a_loss_that_is_not_finite_ends_the_measurement():
    sides = {"ours": Recorded("ours", [], [1.0, float("nan")])}
    with pytest.raises(RunFailed, match="the loss of ours is nan"):
        time_in_turn(sides, batch_size=4, repeats=2)


def test_another_process_answers_or_says_what_is_wrong():
    with OwnProcess(Answers, 1) as other:
        assert other.ask("add", 2) == 3
        process = other.process
        with pytest.raises(RunFailed, match="no disk"):
            other.ask("fail")
        with pytest.raises(RunFailed, match="has ended"):
            other.ask("add", 1)
    assert not process.is_alive()
    with pytest.raises(UserError, match="below nothing"):
        OwnProcess(Answers, -1)


class Operators(TorchDispatchMode):
    """Operators that compute: neither views nor new memory. On a GPU each starts a kernel, those of
    many tensors a few."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        idle = function.is_view or "empty" in name or name in ("_unsafe_view", "record_function")
        self.count += not idle
        return function(*args, **(kwargs or {}))


# Those of a step on CUDA, which docs/speed.md states.
COUNTED = {"mae_vit_b16": 1240, "dino_vit_s16": 2064}


@pytest.mark.parametrize("recipe", COUNTED)
def test_operators_of_a_step_on_cuda(recipe, monkeypatch):
    """With what differs there, on the CPU: attention, whole branches, no rows in turn. What the
    host draws is counted, too."""
    monkeypatch.setattr(row_blocks, "_NUMBERS", 2**60)
    monkeypatch.setattr(linear, "HAS_AMX", False)
    monkeypatch.setattr(clipping, "_LOOPS", ())
    narrow = "--encoder.width 48 --encoder.heads 3 --data.train digits:train --run.device cpu"
    name, config = parse_options([method_of(recipe), "--config", recipe, *narrow.split()])
    kind = find_method(name)
    task, normalize = kind(config.method, config.encoder, 3), Normalize((0.5,) * 3, (0.25,) * 3)
    device, half = torch.device("cpu"), torch.bfloat16
    trainer = trainer_midway(task, config.run, config.optim, normalize, device, half)
    choose_attention(trainer.task, torch.device("cuda", 0))
    trainer.task.train()
    batch = random_batch(kind.view_spec(task.config, task.encoder), 2, 3, 0)
    for _ in range(2):
        with Operators() as seen:
            trainer.update([batch])
        trainer.step += 1
    assert 0.9 * COUNTED[recipe] < seen.count <= COUNTED[recipe]
    assert f"{COUNTED[recipe]:,}" in (ROOT / "docs/speed.md").read_text()
