"""What a step is counted to take without taking it: against formulas, real steps, real sharding."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from ssl_vit.benchmarks.costs import (
    ActivationBytes,
    StateBytes,
    StepCost,
    count_step,
    largest_batch,
    sharded_state,
    state_of,
)
from ssl_vit.benchmarks.speed import random_batch
from ssl_vit.commands import scale
from ssl_vit.commands.benchmark_options import ScaleConfig
from ssl_vit.commands.pretrain_options import default_options
from ssl_vit.commands.scale import scale_report, show_scale
from ssl_vit.common.config import EncoderConfig, OptimConfig, RunConfig
from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.common.rates import PretrainOptim
from ssl_vit.common.task import Task, Views
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.batch import Batch
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods import find_options
from ssl_vit.methods.base import Method, find_method
from ssl_vit.model.architecture import without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.execution import checkpoint_activations, choose_attention
from ssl_vit.options.dino import DINOConfig
from ssl_vit.options.mae import MAEConfig
from ssl_vit.training.footprint import KeptBytes, measure_step, memory_of
from ssl_vit.training.loop import Trainer
from ssl_vit.training.muon import block_matrices, orthogonalizing
from ssl_vit.training.optim import Schedule
from ssl_vit.training.parallel import Parallel, autocast

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALF = torch.bfloat16
ENCODER = EncoderConfig(
    arch="vit_tiny_patch16_224", image_size=(8,), patch_size=2, width=32, depth=2, heads=2
)
METHODS: dict[str, Any] = {
    "mae": MAEConfig(decoder_width=16, decoder_depth=2, decoder_heads=2),
    "dino": DINOConfig(
        prototypes=65, head_width=32, bottleneck=16, local_crops=2, freeze_last_layer="0st"
    ),
}


class Plain(Task):
    """A Vision Transformer, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(ENCODER)

    def forward(self, views: Views, step: int) -> dict[str, Tensor]:
        """Something of all patches."""
        return {"loss": self.encoder(views.crops[0]).patches.sum()}


class Placed(Plain):
    """A loss that asks where the crops lie in their images."""

    def forward(self, views: Views, step: int) -> dict[str, Tensor]:
        """Something of all patches and places."""
        places = views.boxes[0][:, 2:4].prod(1)
        return {"loss": (self.encoder(views.crops[0]).patches.mean((1, 2)) * places).sum()}


def make(name: str) -> Method:
    return find_method(name)(METHODS[name], ENCODER, 3)


def views_of(method: Method) -> ViewSpec:
    return method.view_spec(method.config, method.encoder)


@cache
def counted(name: str) -> StepCost:
    with without_memory():
        method = make(name)
    return count_step(method, views_of(method), 3)


ALONE = Parallel(0, 1, CPU)


def trainer_of(task: Task, parallel: Parallel = ALONE) -> Trainer:
    run, optim = RunConfig(length="10ep"), OptimConfig()
    schedule, normalize = Schedule(run, optim, 10), Normalize((0.5,) * 3, (0.5,) * 3)
    return Trainer(task, run, optim, schedule, normalize, parallel, HALF)


def real_step(task: Method, images: int) -> tuple[int, int]:
    """FLOPs and bytes kept, of a step on noise that moves the weights."""
    spec = views_of(task).crops
    crops = [torch.randint(0, 256, (images * c.count, 3, *c.size)).byte() for c in spec]
    labels = torch.full((images,), -1)
    return measure_step(trainer_of(task), [Batch(Views(crops, torch.arange(images), labels))])


# --- a step -------------------------------------------------------------------------------------


def test_flops_of_a_plain_vit_by_hand():
    """[CLS] and 16 patches of 2x2x3 numbers through two blocks of width 32."""
    tokens, width = 17, 32
    block = 2 * 12 * tokens * width**2 + 2 * 2 * tokens**2 * width
    # Backward by weights and by inputs; the pixels have no gradient.
    expected = 2 * 3 * block + 2 * (2 * 16 * 12 * width)
    spec = ViewSpec((Crop((8, 8)),))
    assert count_step(Plain(), spec, 3).flops == expected


READING = {
    "item": lambda loss, views: loss * loss.item(),
    "if": lambda loss, views: loss if loss > 0 else -loss,
    "nonzero": lambda loss, views: loss + views.crops[0].nonzero().sum(),
    "boolean index": lambda loss, views: loss + views.crops[0][views.crops[0] > 0].sum(),
}


@pytest.mark.parametrize("how", READING)
def test_a_step_that_reads_from_the_device_is_refused_in_words(how):
    """Which is what it does, what does so, and what to do instead; in one line."""

    class Reads(Plain):
        def forward(self, views: Views, step: int) -> dict[str, Tensor]:
            return {"loss": READING[how](super().forward(views, step)["loss"], views)}

    with pytest.raises(RunFailed) as refusal:
        count_step(Reads(), ViewSpec((Crop((8, 8)),)), 3)
    said = str(refusal.value)
    assert said.startswith("a step of Reads reads numbers from the device (aten.")
    for part in (".item()", "nonzero", "a GPU is waited for", "Method.draw", "torch.where"):
        assert part in said
    assert "\n" not in said


def test_what_a_method_draws_is_there_to_be_counted():
    """A step that needs ``views.drawn`` costs what the same step costs without a draw."""

    class Drawn(Plain):
        def forward(self, views: Views, step: int) -> dict[str, Tensor]:
            mask = views.drawn["mask"]
            assert mask.shape == (len(views.keys), 16)
            patches = self.encoder(views.crops[0]).patches
            return {"loss": torch.where(mask[:, :, None], patches, 0).sum()}

    spec = ViewSpec((Crop((8, 8)),), draw=lambda rng: {"mask": rng.random(16) < 0.5})
    assert (
        count_step(Drawn(), spec, 3).flops == count_step(Plain(), replace(spec, draw=None), 3).flops
    )


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_flops_are_those_of_a_real_step_whatever_the_kernel(name):
    """Of attention by matrix products, as on CPUs; what is counted runs the fused kernel."""
    task = make(name)
    choose_attention(task, CPU)
    assert real_step(task, 5)[0] == 5 * counted(name).flops


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_activations_are_those_of_a_real_step_to_the_byte(name):
    task, cost = make(name), counted(name)
    choose_attention(task, GPU)
    assert real_step(task, 7)[1] == 7 * cost.kept.per_image + cost.kept.fixed
    linear = [m for m in task.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    assert cost.kept.fixed >= 2 * sum(m.weight.numel() for m in linear)  # in bfloat16


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_checkpointing_leaves_inputs_and_one_block(name):
    task, cost, images = make(name), counted(name), 7
    choose_attention(task, GPU)
    # The global crops, both at once; the decoder, narrow but of all patches.
    part: Any = task
    block, shape = {
        "mae": lambda: (part.objective.decoder.blocks[0], (images, 17, 16)),
        "dino": lambda: (part.encoder.vit.blocks[0], (2 * images, 17, 32)),
    }[name]()
    largest = kept_by(block.train(), torch.randn(shape, requires_grad=True) * 1)
    checkpoint_activations(task)
    left = real_step(task, images)[1]
    assert left + largest == images * cost.recomputed.per_image + cost.recomputed.fixed
    assert cost.recomputed.per_image < 0.8 * cost.kept.per_image


def kept_by(block: nn.Module, x: Float[Tensor, "b n d"]) -> int:
    kept = KeptBytes(block)
    with kept.watch():
        with autocast(CPU, HALF):
            out = block(x)
        out.sum().backward()
    return kept.most


# --- memory whatever the batch ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_state_of_a_process_alone(name):
    task = make(name)
    trainer = trainer_of(task)
    state, memory = state_of(task), memory_of(trainer, 0.0)
    parts = (memory.weights, memory.gradients, memory.moments)
    assert (state.weights, state.gradients, state.moments) == parts
    assert state.total == memory.total


@pytest.fixture
def five_processes():
    """As this one, the first of them, sees them."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=5)
    yield 5
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_state_of_a_sharded_process(name, five_processes):
    """65 rows are 13 each; 16, 17, 32 and 96 do not divide by 5."""
    task = make(name)
    found, alone = sharded_state(task, five_processes), state_of(task)
    names = {n for n, _ in task.named_parameters()}
    five = Parallel(0, five_processes, CPU, "fsdp")
    memory = memory_of(trainer_of(task, five), 0.0)
    assert found.weights == memory.weights < alone.weights
    assert found.gradients == memory.gradients
    assert found.moments == memory.moments
    root: Any = task
    group = root._get_fsdp_state()._fsdp_param_group.fsdp_params
    gathered = 0.0
    for parameter in group:
        size = 4 * parameter._orig_size.numel()
        moves = parameter.sharded_param.requires_grad
        matrix = moves and parameter.sharded_param.ndim > 1
        gathered += size + moves * size + matrix * size / 2
    assert found.gathered == gathered
    assert 0 < len(group) < len(names)


def test_the_largest_batch_fits_and_one_image_more_does_not():
    state, kept = StateBytes(400, 100, 200), ActivationBytes(per_image=7, fixed=50)
    for room in (750.0, 756.9, 757.0, 1000.0):
        batch = largest_batch(room, state, kept)
        assert state.total + 50 + 7 * batch <= room < state.total + 50 + 7 * (batch + 1)
    assert largest_batch(600.0, state, kept) == 0
    # Gathered weights have their halves in it.
    assert largest_batch(750.0, replace(state, gathered=50), kept) == 0
    assert largest_batch(757.0, replace(state, gathered=50), kept) == 1


# --- the report ---------------------------------------------------------------------------------


def options(**changes: Any) -> ScaleConfig[Any]:
    default: ScaleConfig[Any] = default_options(ScaleConfig, find_options("mae"))
    small = {"archs": ("test_vit",), "image_sizes": (50,), "devices": (3,)}
    return replace(default, **(small | changes))


def test_report_of_work_time_and_memory(tmp_path, monkeypatch, capsys):
    file = tmp_path / "own.yaml"
    file.write_text(
        "run: {length: 500st}\noptim: {batch_size: 100}\nmethod: {decoder_depth: 1}\n"
        "encoder: {arch: test_vit, image_size: [48]}\n"
    )
    monkeypatch.setattr(scale, "recipes", lambda: {"mae_vit_own": file, "dino_vit_s16": file})
    config = options(
        method=MAEConfig(decoder_depth=1),
        encoder=EncoderConfig("test_vit", (48,), drop_path=0.5),  # which leaves no trace
        run=RunConfig(length="20ep"),
        count=1000,
        share=0.25,
        peak=100.0,
    )
    report = json.loads(json.dumps(scale_report("mae", find_method("mae"), config)))
    (size,), (larger,), (recipe,) = (report[k] for k in ("sizes", "resolutions", "recipes"))
    assert size["flop_in_all"] == 20_000 * size["flop_per_image"]
    assert size["hours"] == {"3": pytest.approx(size["flop_in_all"] / (3 * 25e12) / 3600)}
    assert larger["crops"] == [{"count": 1, "size": [48, 48]}]  # 50, in whole patches
    assert larger["flop_per_image"] == size["flop_per_image"]
    assert (recipe["name"], recipe["length"]) == ("mae_vit_own", "500st")
    assert recipe["flop_in_all"] == 50_000 * recipe["flop_per_image"]
    assert recipe["hours"].keys() == {"3"}
    assert recipe["flop_per_image"] == size["flop_per_image"]
    room = 0.9 * 139 * 2**30
    kept, batch = size["activations"]["kept"], size["largest_batch"]["kept"]["1"]
    used = size["state"]["1"]["total"] + kept["fixed"] + batch * kept["per_image"]
    assert used <= room < used + kept["per_image"]
    assert size["state"]["fsdp 3"]["total"] < size["state"]["1"]["total"]
    show_scale(report)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert "prediction for 20ep: 25% of 100 TFLOP/s a device" in shown
    assert f"{larger['flop_per_image'] / 1e9:.1f}" in shown


def test_hours_and_memory_with_muon(monkeypatch):
    """Every device orthogonalizes all matrices of blocks in each step; it keeps one moment."""
    monkeypatch.setattr(scale, "recipes", dict)
    run = {"run": RunConfig(length="300st"), "peak": 100.0, "share": 0.25, "image_sizes": ()}
    small = {"encoder": EncoderConfig("test_vit"), "method": MAEConfig(decoder_depth=2)}
    plain, muon = (
        scale_report(
            "mae", find_method("mae"), options(optim=PretrainOptim(name=name), **run, **small)
        )
        for name in ("adamw", "muon")
    )
    before, after = plain["sizes"][0], muon["sizes"][0]
    assert after["flop_per_image"] == before["flop_per_image"]
    work = 3600 * 25e12 * (after["hours"]["3"] - before["hours"]["3"]) / 300
    saved = before["state"]["1"]["moments"] - after["state"]["1"]["moments"]
    with without_memory():
        task = find_method("mae")(small["method"], small["encoder"], 3)
    matrices = block_matrices(task)
    assert work == pytest.approx(orthogonalizing(matrices), rel=1e-6)
    assert saved == 4 * sum(p.numel() for p in matrices)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"archs": ()}, "--archs is empty"),
        ({"devices": ()}, "--devices is empty"),
        ({"devices": (8, 0)}, "--devices is 8 0; it must be 1 or more"),
        ({"image_sizes": (224, 0)}, "--image-sizes is 224 0; it must be 1 or more"),
        ({"count": 0}, "--count is 0; it must be 1 or more"),
        ({"peak": 0.0}, "--peak is 0; it must be above 0"),
        ({"memory": float("nan")}, "--memory is nan; it must be above 0"),
        ({"share": 1.5}, "--share is 1.5; it must be above 0 and at most 1"),
        ({"run": RunConfig(precision="fp32")}, "--run.precision is fp32; scale supports bf16"),
    ],
)
def test_options_that_are_refused(changes, said):
    with pytest.raises(UserError) as error:
        options(**changes)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": EncoderConfig(width=96)}, "--encoder.width is 96; scale supports whole"),
        ({"image_sizes": (224, 15)}, "--image-sizes is 224 15; a patch is 16 wide"),
        ({"archs": ("vit_tiny",)}, "--encoder.arch is 'vit_tiny'; it must be a plain ViT"),
    ],
)
def test_sizes_that_cannot_be_built(changes, said):
    with pytest.raises(UserError) as error:
        scale_report("mae", find_method("mae"), options(**changes))
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_batches_made_up_have_boxes():
    """A loss between the places of crops is counted and measured as any other."""
    spec = ViewSpec((Crop((8, 8), count=2),))
    with without_memory():
        placed = Placed()
    assert count_step(placed, spec, 3).flops > 0
    batch = random_batch(spec, 4, 3, seed=0)
    assert [tuple(b.shape) for b in batch.views.boxes] == [(8, 5)]
    assert torch.isfinite(Placed()(Normalize((0.5,) * 3, (0.5,) * 3)(batch.views), 0)["loss"])
