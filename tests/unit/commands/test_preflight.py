"""What a preflight counts, against formulas; what it warns of, and what it does not."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit.benchmarks import trial
from ssl_vit.benchmarks.trial import Found, Throughput, combined_throughput, try_out
from ssl_vit.commands.preflight import advice, long_duration, size
from ssl_vit.commands.pretraining import Pretraining, build
from ssl_vit.methods.dino import DINO
from ssl_vit.model.attention import cls_features
from ssl_vit.objectives.base import Setting
from ssl_vit.pretrain import parse_options
from ssl_vit.training.footprint import KeptBytes, Memory, measure_step, memory_of, nbytes
from tests.integration.conftest import TINY, TINY_DINO

FP32 = ("--run.precision", "fp32", "--run.device", "cpu")
# Given, for no test here is of them: estimated ones are of all images, anew for each session.
STATISTICS = ("--data.mean", "0.3", "--data.std", "0.4")
# A batch of few images, where no number of them is asked for.
FEW = ("--optim.batch-size", "24")


def session_of(method: str, folder: Path, *flags: str) -> Pretraining:
    file = folder / f"{method}.yaml"
    file.write_text({"mae": TINY, "dino": TINY_DINO}[method])
    argv = [method, "--config", str(file), "--run.out", str(folder / "run"), *FP32, *flags]
    return build(*parse_options(argv))


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(trial, "_LOADER_SECONDS", 0.02)
    monkeypatch.setattr(trial, "_STEP_SECONDS", 0.02)


@pytest.fixture
def make(tmp_path):
    return lambda method, *flags: session_of(method, tmp_path, *STATISTICS, *flags)


def first_images(session: Pretraining, count: int) -> trial.Batch:
    epoch, indices = session.order.part(0, 0)
    return trial._images(session).__getitems__([(epoch, int(i)) for i in indices[:count]])


# --- operations ---------------------------------------------------------------------------------


def test_flops_of_mae_by_hand(make):
    """4 of 16 patches of 4 pixels through width 32, all through a decoder of width 16."""

    def linear(tokens: int, a: int, b: int) -> int:
        return 2 * tokens * a * b

    def block(tokens: int, width: int) -> int:
        return 12 * linear(tokens, width, width) + 2 * 2 * tokens**2 * width

    # Forward, and backward by weights and by inputs; the pixels have no gradient.
    expected = 2 * linear(4, 4, 32)
    expected += 3 * (block(5, 32) + linear(5, 32, 16) + linear(12, 16, 4))
    # The decoder's only block: keys and values of all tokens, the rest of the masked ones.
    last = linear(17, 16, 32) + 2 * 2 * 12 * 17 * 16 + 10 * linear(12, 16, 16)
    expected += 3 * last
    session = make("mae", *FEW)
    assert measure_step(session.trainer, [first_images(session, 7)])[0] == 7 * expected
    assert try_out(session).flops == expected
    # What Muon multiplies is of the step, not of its images.
    session = make("mae", *FEW, "--optim.name", "muon")
    assert measure_step(session.trainer, [first_images(session, 7)])[0] == 7 * expected
    assert try_out(session).flops == expected


def test_flops_of_dino_are_of_student_and_teacher(make):
    """And, a few, of the device's half of the augmentation: blur is a matrix product."""
    session = make("dino")
    batch, task = first_images(session, 5), session.task
    assert isinstance(task, DINO)
    with FlopCounterMode(display=False) as augmentation:
        views = session.trainer.normalize(batch.views)
    both = torch.cat(views.crops[:2])
    for block in task.encoder.vit.blocks:
        block.whole = True  # what stochastic depth may spare is counted
    with FlopCounterMode(display=False) as teacher, torch.no_grad():
        copy = task.objective.teacher
        copy.head(cls_features(copy.encoder, both))
    with FlopCounterMode(display=False) as student:
        cls = [cls_features(task.encoder, crops) for crops in (both, *views.crops[2:])]
        task.objective.head(torch.cat(cls)).sum().backward()
    parts = [counter.get_total_flops() for counter in (augmentation, teacher, student)]
    assert all(parts)
    assert measure_step(session.trainer, [batch])[0] == sum(parts)


# --- memory -------------------------------------------------------------------------------------


def test_kept_bytes_by_hand():
    """Inputs, the relu's output (once, though two need it), and what is squared."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    kept = KeptBytes(model)
    with kept.watch():
        for batch in (3, 5, 2):  # one after the other: the largest counts, not the sum
            model(torch.randn(batch, 8)).square().mean().backward()
    assert kept.most == 4 * 5 * (8 + 16 + 4)


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_memory_by_part(method, make):
    session = make(method, *FEW)
    found, task = try_out(session).memory, session.task
    trained = [p for p in task.parameters() if p.requires_grad]
    bytes_trained = 4 * sum(p.numel() for p in trained)
    everything = [*task.parameters(), *task.buffers()]
    assert found.weights == 4 * sum(t.numel() for t in everything)
    assert found.gradients == bytes_trained
    # AdamW counts the steps of each parameter, but for the last layer, which is still frozen.
    counters = 4 * sum(1 for p in trained if p in session.trainer.optimizer.state)
    assert found.moments == 2 * bytes_trained + counters
    assert found.total == found.weights + found.gradients + found.moments + found.activations
    if method == "dino":
        teacher = nbytes(list(task.objective.teacher.parameters()))
        assert found.weights > bytes_trained + teacher
        assert len(session.trainer.optimizer.state) < len(trained)


@pytest.mark.parametrize("method", ["mae", "dino"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_a_whole_part_follow_from_a_few_images(method, precision, make):
    batch = ("--optim.batch-size", "60", "--optim.accumulate", "3")
    session = make(method, "--run.precision", precision, *batch)
    predicted = try_out(session).memory.activations
    parts = [first_images(session, 20)] * 3
    assert measure_step(session.trainer, parts)[1] == predicted


def test_checkpointing_keeps_less_and_computes_more(make):
    plain = try_out(make("dino", *FEW))
    again = try_out(make("dino", *FEW, "--run.activation-checkpointing"))
    assert again.memory.activations < 0.5 * plain.memory.activations
    assert again.memory.state == plain.memory.state
    assert again.flops > 1.1 * plain.flops


def test_a_part_of_one_image(make):
    session = make("mae", "--optim.batch-size", "2", "--optim.accumulate", "2")
    found = try_out(session)
    assert found.memory.activations == found.per_image > 0
    assert found.flops == try_out(make("mae", *FEW)).flops


# --- what does not fit --------------------------------------------------------------------------


def test_the_local_crops_that_fit(make, monkeypatch):
    """With as many as it says a step fits, with one more it does not."""
    whole = try_out(make("dino", *FEW, "--method.local-crops", "6")).memory
    room = 0.75 * whole.total

    def little(device: torch.device, processes: int) -> float:
        return room - whole.state

    monkeypatch.setattr(trial, "free_memory", little)
    session = make("dino", *FEW, "--method.local-crops", "6")
    found = try_out(session)
    assert not found.fits
    assert found.throughput is None
    lines = advice(session, found)
    told = next(line for line in lines if "--method.local-crops is 6" in line)
    fitting = int(told.split(";")[1].split()[0])
    assert 0 < fitting < 6
    for count in (fitting, fitting + 1):
        fits = try_out(make("dino", *FEW, "--method.local-crops", str(count))).fits
        assert fits == (count <= fitting), count
    assert any("a step does not fit" in line for line in lines)


def test_the_parts_that_fit(make, monkeypatch):
    whole = try_out(make("mae")).memory
    room = whole.state + 0.4 * whole.activations
    monkeypatch.setattr(trial, "free_memory", lambda device, processes: room - whole.state)
    session = make("mae")
    (told,) = advice(session, try_out(session))
    parts = told.split("--optim.accumulate ")[1].split(",")[0]
    assert int(parts) > 2
    assert try_out(make("mae", "--optim.accumulate", parts)).fits


# --- throughput -----------------------------------------------------------------------------------


def test_pace_of_loader_and_step():
    assert combined_throughput(100.0, 25.0, 0, 1, 2).run == pytest.approx(20)  # in turn: 10 + 40 ms
    assert combined_throughput(1000.0, 300.0, 8, 0, 16) == Throughput(
        1000.0, 300.0, 300.0, "the step"
    )
    assert combined_throughput(200.0, 300.0, 8, 0, 16) == Throughput(
        200.0, 300.0, 200.0, "the loader"
    )
    # Two threads and a worker on two cores: 10 + 20 core milliseconds an image.
    shared = combined_throughput(100.0, 100.0, 1, 2, 2)
    assert shared.run == pytest.approx(2 / 0.030)
    assert "share" in shared.bound
    # A core for each of them, or hardly any work for one: nothing is shared.
    assert combined_throughput(100.0, 90.0, 1, 1, 2) == Throughput(100.0, 90.0, 90.0, "the step")
    assert combined_throughput(10000.0, 90.0, 1, 2, 2).bound == "the step"


def test_rates_are_measured(make):
    throughput = try_out(make("mae", *FEW)).throughput
    assert throughput is not None
    assert min(throughput.loader, throughput.step) > 0
    in_turn = 1 / (1 / throughput.loader + 1 / throughput.step)  # without workers
    assert throughput.run == pytest.approx(in_turn)


# --- advice -------------------------------------------------------------------------------------

MEMORY = Memory(1e9, 1e9, 2e9, 4e9)
FOUND = Found(1e9, MEMORY, available=math.inf, per_image=1e6)
GPU = Setting(images=1_281_167, batch_size=512, parts=1)


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({}, {}, None),
        ({"batch_size": 256}, {}, "raise it, to 0.9995"),
        ({"batch_size": 256}, {"momentum": 0.9995}, None),
        ({"batch_size": 64, "images": 50_000}, {"momentum": 0.99}, None),
        ({"parts": 4}, {}, "centre and teacher move once a step, by the whole batch of 512"),
        ({"lacking": 5.0, "per_crop": 2.0}, {}, "--method.local-crops is 8; 5 should fit"),
        ({"lacking": 5.0, "per_crop": 0.5}, {}, None),
        ({"lacking": 5.0}, {}, None),
    ],
)
def test_advice_of_dino(change, options, said, make):
    task = make("dino", "--method.momentum", "0.996", "--method.local-crops", "8").task
    assert isinstance(task, DINO)
    task.objective.config = replace(task.config, **options)
    lines = task.advice(replace(GPU, **change))
    assert [said in line for line in lines] == ([True] if said else [])


def test_mae_advises_nothing(make):
    trouble = replace(GPU, batch_size=64, parts=4, lacking=5.0, per_crop=2.0)
    assert make("mae").task.advice(trouble) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), None),
        (("--optim.base-lr", "1e-3"), "--optim.base-lr 0.001 has no effect beside --optim.lr"),
        (("--optim.lr", "None"), None),
        (("--optim.lr", "1e-6"), "--optim.base-lr that of 256 images"),
        (("--optim.lr", "0.02"), "lower it"),
        (("--optim.warmup", "20st"), "is cut to 12, half the run"),
        (
            ("--encoder.image-size", "32", "--encoder.patch-size", "8"),
            "enlarged at least 4.0 times",
        ),
        (("--encoder.image-size", "16"), None),
        (("--data.mean", "1500", "--data.std", "300"), "the encoder is given values around -5"),
    ],
)
def test_advice_on_the_options(flags, said, make):
    lines = advice(make("mae", *flags), FOUND)
    assert [said in line for line in lines] == ([True] if said else [])


@pytest.mark.parametrize(
    ("device", "workers", "throughput", "said"),
    [
        (
            "cpu",
            "0",
            Throughput(100.0, 100.0, 50.0, "loading and computing in turn"),
            "workers 1 or more",
        ),
        ("cpu", "0", Throughput(1e4, 100.0, 99.0, "loading and computing in turn"), None),
        ("cpu", "1", Throughput(100.0, 300.0, 100.0, "the loader"), "give --data.workers 3"),
        ("cpu", "1", Throughput(100.0, 900.0, 100.0, "the loader"), "give --data.workers 3"),
        ("cpu", "1", Throughput(95.0, 100.0, 95.0, "the loader"), None),
        ("cpu", "3", Throughput(100.0, 300.0, 100.0, "the loader"), None),
        ("cuda", "1", Throughput(100.0, 900.0, 100.0, "the loader"), "give --data.workers 4"),
        ("cuda", "4", Throughput(100.0, 300.0, 100.0, "the loader"), "on all 4 cores"),
        ("cuda", "4", Throughput(300.0, 100.0, 100.0, "the step"), None),
    ],
)
def test_advice_on_the_pace(device, workers, throughput, said, make, monkeypatch):
    """With four cores, of which a step on the CPU takes one."""
    monkeypatch.setattr("ssl_vit.commands.preflight.own_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    session = make("mae", "--data.workers", workers)
    session.parallel = replace(session.parallel, device=torch.device(device))
    lines = advice(session, replace(FOUND, throughput=throughput))
    assert [said in line for line in lines] == ([True] if said else [])


@pytest.mark.parametrize(
    ("available", "said"),
    [(10e9, "--optim.accumulate is 4, and 1 should fit"), (4.06e9, None)],
)
def test_parts_that_a_gpu_does_not_need(available, said, make):
    """State 4 GB and 120 images of 1 MB."""
    session = make("mae", "--optim.accumulate", "4")
    session.parallel = replace(session.parallel, device=torch.device("cuda"))
    lines = advice(session, replace(FOUND, available=available))
    assert [said in line for line in lines] == ([True] if said else [])


def test_a_loss_that_is_not_finite_is_told(make):
    session = make("mae", *FEW)
    with torch.no_grad():
        session.task.encoder.vit.norm.weight.fill_(math.nan)
    found = try_out(session)
    assert not found.finite
    assert any("not finite" in line for line in advice(session, found))


def test_sizes_and_durations_for_people():
    assert [size(5.0 * 2**20), size(1.5 * 2**30)] == ["5.00 MiB", "1.50 GiB"]
    assert [long_duration(s) for s in (65.0, 3661.0, 90061.0)] == ["1:05", "1:01:01", "1 d 1:01:01"]


def test_moments_of_a_run_that_has_none_yet(make):
    trainer = make("mae").trainer
    assert memory_of(trainer, 0.0).moments == 2 * nbytes(trainer.trained)
