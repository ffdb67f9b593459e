"""Peer with a student and a teacher: what all peers of self-distillation share."""

from __future__ import annotations

from typing import Any

from torch import nn

from ssl_vit.benchmarks.peers import Peer, timm_vit
from ssl_vit.benchmarks.side import Workload


class TeacherAndStudent(Peer):
    """Teacher and student: each a ViT for any image size, with a head on [CLS]."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.momentum, self.teacher_temp = work.method.momentum, work.method.teacher_temp
        self.holds_last = False

    def last_layer(self) -> nn.Module:
        """The student's prototypes."""
        raise NotImplementedError

    def at(self, objective: Any, step: int) -> None:
        """Momentum and temperature of the teacher; the last layer, which does not move at first."""
        self.momentum = objective.teacher_momentum(step)
        self.teacher_temp = objective.teacher_temp(step)
        self.holds_last = step < objective.freeze_steps

    def clip(self) -> None:
        """No gradients of a last layer that does not move."""
        for parameter in self.last_layer().parameters() if self.holds_last else ():
            parameter.grad = None

    def begin_both(self, networks: list[nn.Module]) -> None:
        """Setup of student and teacher; the teacher starts as a copy and is not trained."""
        student, teacher = networks
        teacher.load_state_dict(student.state_dict(), strict=True)
        teacher.requires_grad_(False)
        self.begin(nn.ModuleDict({"student": student, "teacher": teacher}))

    def vit(self, drop_path: float) -> Any:
        """ViT of one network, with timm's default attention."""
        return timm_vit(self.work, drop_path_rate=drop_path, dynamic_img_size=True)

    @property
    def drop_paths(self) -> tuple[float, float]:
        """Stochastic depth rates of student and teacher."""
        return self.work.encoder.drop_path, 0.0
