"""DINO against numbers recorded from the original implementation, in float64, relative 1e-6.

The real trainer does the steps: schedules, clipping, freezing, AdamW, teacher and centre.
"""

import pytest
import torch

from ssl_vit.common.config import EncoderConfig, OptimConfig, RunConfig
from ssl_vit.common.task import Views
from ssl_vit.data.batch import Batch
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods.dino import DINO
from ssl_vit.model.execution import choose_attention
from ssl_vit.options.dino import DINOConfig
from ssl_vit.training.loop import Trainer
from ssl_vit.training.optim import Schedule
from ssl_vit.training.parallel import Parallel
from tests.parity.golden import check_there_are, close, golden_files, read_golden

FILES = golden_files("dino_*.safetensors")
CPU = torch.device("cpu")
CENTER = "objectives.dino.center.value"


def test_there_are_golden_files():
    check_there_are(FILES, "dino_*.safetensors")


class AsIs(Normalize):
    """The recorded crops are used as they are, in float64."""

    def forward(self, views: Views) -> Views:
        return views


def our_name(theirs: str) -> str:
    """The original's parameter name as the student's in ours."""
    ours = theirs.replace("backbone.", "encoder.vit.", 1)
    return ours.replace("head.", "objectives.dino.head.", 1)


def teachers_name(theirs: str) -> str:
    """The original's parameter name as the teacher's in ours."""
    teacher = "objectives.dino.teacher."
    ours = theirs.replace("backbone.", f"{teacher}encoder.vit.", 1)
    return ours.replace("head.", f"{teacher}head.", 1)


class Case:
    """A golden file, our method with its weights, and a trainer with its options."""

    def __init__(self, path) -> None:
        c, self.tensors = read_golden(path)
        self.config = c
        encoder = EncoderConfig(
            arch="vit_tiny_patch16_224",
            image_size=tuple(c["img_size"]),
            patch_size=c["patch_size"],
            width=c["embed_dim"],
            depth=c["depth"],
            heads=c["num_heads"],
        )
        method = DINOConfig(
            prototypes=c["out_dim"],
            head_width=c["hidden_dim"],
            bottleneck=c["bottleneck_dim"],
            norm_last_layer=c["norm_last_layer"],
            freeze_last_layer=f"{c['freeze_last_layer_epochs']}ep",
            momentum=c["momentum"],
            teacher_temp=c["teacher_temp"],
            teacher_temp_start=c["warmup_teacher_temp"],
            teacher_temp_warmup=f"{c['warmup_teacher_temp_epochs']}ep",
            student_temp=c["student_temp"],
            center_momentum=c["center_momentum"],
            local_crops=c["ncrops"] - 2,
        )
        optim = OptimConfig(
            batch_size=c["batch"],
            lr=c["lr"],
            min_lr=c["min_lr"],
            warmup=f"{c['warmup_epochs']}ep",
            weight_decay=c["weight_decay"][0],
            weight_decay_end=c["weight_decay"][1],
            clip=float(c["clip_grad_per_parameter"]),
            clip_by="parameter",
        )
        run = RunConfig(length=f"{c['epochs']}ep", precision="fp32")
        self.model = DINO(method, encoder, 3).double()
        choose_attention(self.model, CPU)
        self._load()
        schedule = Schedule(run, optim, c["steps_per_epoch"], self.model.peak_in_warmup)
        normalize, parallel = AsIs((0.0,) * 3, (1.0,) * 3), Parallel(0, 1, CPU)
        self.trainer = Trainer(self.model, run, optim, schedule, normalize, parallel, torch.float32)

    def _load(self) -> None:
        """Every recorded weight goes into student and teacher, which have no other."""
        weights = {
            name.removeprefix("weights."): value.double()
            for name, value in self.tensors.items()
            if name.startswith("weights.")
        }
        state = {our_name(n): v for n, v in weights.items()}
        state |= {teachers_name(n): v for n, v in weights.items()}
        state[CENTER] = torch.zeros_like(self.model.objective.center.value)
        self.model.load_state_dict(state, strict=True)

    def batch(self, step: int) -> Batch:
        """The crops of a step: two global ones, then the local ones view by view."""
        crops = self.tensors[f"step{step}.crops"].double()
        n = crops.shape[1]
        kinds = [crops[0], crops[1], crops[2:].flatten(0, 1)]
        return Batch(Views(kinds, torch.arange(n), torch.full((n,), -1)))

    def expected(self, prefix: str, rename) -> dict[str, torch.Tensor]:
        """Recorded tensors under a prefix, by our names."""
        found = {n: v for n, v in self.tensors.items() if n.startswith(prefix)}
        assert found
        return {rename(n.removeprefix(prefix)): v for n, v in found.items()}


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def case(request):
    return Case(request.param)


def test_schedules(case):
    """Learning rate, weight decay and momentum of every step."""
    golden, steps = case.tensors, range(len(case.tensors["losses"]))
    schedule = case.trainer.schedule
    for name, ours in (
        ("lr_schedule", schedule.lr),
        ("wd_schedule", schedule.weight_decay),
        ("momentum_schedule", case.model.objective.teacher_momentum),
    ):
        close(torch.tensor([ours(s) for s in steps]).double(), golden[name], name)


def test_first_outputs(case):
    """What teacher and student say of the first batch."""
    crops = case.batch(0).views.crops
    with torch.no_grad():
        copy = case.model.objective.teacher
        teacher = copy.head(copy.encoder(torch.cat(crops[:2])).cls)
        student = case.model.objective.head(case.model.encoder(torch.cat(crops)).cls)
    close(teacher, case.tensors["step0.teacher_out"], "teacher")
    close(student, case.tensors["step0.student_out"], "student")


def test_trajectory(case):
    """First gradients after clipping and freezing, all losses, final student, teacher, centre."""
    trainer, losses = case.trainer, []
    for step in range(len(case.tensors["losses"])):
        scalars = trainer.update([case.batch(step)])
        losses.append(scalars["loss"])
        if step == 0:
            ours = {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
            theirs = case.expected("step0.grads.", our_name)
            assert ours.keys() == theirs.keys()
            for name, expected in theirs.items():
                close(ours[name], expected, name)
        trainer.step += 1
    close(torch.stack(losses), case.tensors["losses"], "losses")
    close(case.model.objective.center.value[None], case.tensors["center"], "centre")
    state = case.model.state_dict()
    final = case.expected("final.student.", our_name)
    final |= case.expected("final.teacher.", teachers_name)
    assert final.keys() == state.keys() - {CENTER}
    for name, expected in final.items():
        close(state[name], expected, name)
