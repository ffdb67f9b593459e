"""DINOv2 peers: the original's training step, written from its description (Oquab et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from ssl_vit.benchmarks.chains import OriginalChain
from ssl_vit.benchmarks.peers import Peer, check_plain, timm_vit
from ssl_vit.benchmarks.side import Workload
from ssl_vit.benchmarks.speed import random_batch
from ssl_vit.common.errors import check

_EPS = 1e-8


def dropped_rows(x: Tensor, branch: Callable[[Tensor], Tensor], rate: float) -> Tensor:
    """``x`` plus a branch of so many of its rows, at random, and of no others."""
    kept = max(int(len(x) * (1 - rate)), 1)
    rows = torch.randperm(len(x), device=x.device)[:kept]
    found = branch(x[rows])
    flat = torch.index_add(x.flatten(1), 0, rows, found.flatten(1).to(x.dtype), alpha=len(x) / kept)
    return flat.view_as(x)


class OriginalDINOv2(Peer):
    """Original DINOv2 step, in its terms: [CLS] of local and of global crops, patches, KoLeo.

    Crops of one resolution go through the ViT together, with plain attention in every block for all
    tokens. Stochastic depth, equal in all blocks, computes the rows that it keeps. Losses are
    computed pair by pair; each network's gradients are clipped, and the teacher is moved parameter
    by parameter. Masks are those of our batch.
    """

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.encoder = check_plain(work, "original", square=False)
        for option, plain in (("gram_weight", 0), ("local_norm", False), ("local_weight", 1)):
            value = getattr(work.method, option)
            name = f"--method.{option.replace('_', '-')}"
            check(value == plain, f"{name} is {value}; the original peer has it at {plain} only")
        method = work.method
        outputs = method.patch_prototypes or method.prototypes
        self.centers = [torch.zeros(k, device=work.device) for k in (method.prototypes, outputs)]
        student, teacher = self._network(token=True), self._network(token=False)
        self.give(teacher, student.state_dict())
        teacher.requires_grad_(False)
        self.begin(nn.ModuleDict({"student": student, "teacher": teacher}))
        drawn = random_batch(work.spec, work.batch_size, work.channels, work.seed).views.drawn
        self.drawn = {name: value.to(work.device) for name, value in drawn.items()}

    def _network(self, token: bool) -> Any:
        method = self.work.method
        vit = timm_vit(self.work, dynamic_img_size=True)
        for part in vit.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = False
        heads = {"cls": self._head(method.prototypes, method.bottleneck)}
        if method.patch_prototypes:
            own = method.patch_bottleneck or method.bottleneck
            heads["patch"] = self._head(method.patch_prototypes, own)
        network = nn.ModuleDict({"vit": vit, "heads": nn.ModuleDict(heads)})
        if token:
            network.register_parameter("mask_token", nn.Parameter(torch.zeros(1, vit.embed_dim)))
        return network

    def _head(self, prototypes: int, bottleneck: int) -> nn.Module:
        method, width = self.work.method, self.encoder.width
        widths = [width, *[method.head_width] * (method.head_depth - 1), bottleneck]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        last: Any = nn.Linear(bottleneck, prototypes, bias=False)
        if not method.plain_last_layer:
            last = weight_norm(last)
            last.parametrizations.weight.original0.data.fill_(1)
        return nn.ModuleDict({"mlp": nn.Sequential(*layers[:-1]), "last_layer": last})

    @staticmethod
    def give(network: nn.Module, state: dict[str, Tensor]) -> None:
        """Load weights named as ours are; a mask token where there is one."""
        named = dict(state)
        for ours, theirs in (("g", "original0"), ("v", "original1")):
            parametrized = f"last_layer.parametrizations.weight.{theirs}"
            named = {k.replace(f"last_layer.weight_{ours}", parametrized): named[k] for k in named}
        if not hasattr(network, "mask_token"):
            named.pop("mask_token", None)
        network.load_state_dict(named, strict=True)

    def _tokens(self, network: Any, images: Tensor, masked: Tensor | None, rate: float) -> Tensor:
        vit = network.vit
        x = vit.patch_embed(images)
        if masked is not None:
            hidden = masked.view(*x.shape[:3], 1)
            x = torch.where(hidden, network.mask_token.to(x.dtype), x)
        x = vit.norm_pre(vit._pos_embed(x))
        for block in vit.blocks:
            if rate > 0 and vit.training:
                x = dropped_rows(x, nn.Sequential(block.norm1, block.attn, block.ls1), rate)
                x = dropped_rows(x, nn.Sequential(block.norm2, block.mlp, block.ls2), rate)
            else:
                x = block(x)
        out: Tensor = vit.norm(x)
        return out

    @staticmethod
    def _outputs(network: Any, rows: Tensor, kind: str) -> Tensor:
        head = network.heads[kind if kind in network.heads else "cls"]
        out: Tensor = head.last_layer(F.normalize(head.mlp(rows), dim=-1, eps=1e-6))
        return out.float()

    def _targets(self, outputs: Tensor, which: int) -> Tensor:
        """Softmax less the centre, which then moves, or three iterations of Sinkhorn-Knopp."""
        method = self.work.method
        if method.targets == "centering":
            found = ((outputs - self.centers[which]) / method.teacher_temp).softmax(-1)
            share, mean = method.center_momentum, outputs.mean(0)
            self.centers[which] = self.centers[which] * share + mean * (1 - share)
            return found
        mass = (outputs / method.teacher_temp).exp().T
        mass = mass / mass.sum()
        prototypes, rows = mass.shape
        for _ in range(3):
            mass = mass / mass.sum(1, keepdim=True) / prototypes
            mass = mass / mass.sum(0, keepdim=True) / rows
        return (mass * rows).T

    @torch.no_grad()
    def _taught(self, both: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        teacher = self.networks.teacher
        tokens = self._tokens(teacher, both, None, 0.0)
        cls = self._targets(self._outputs(teacher, tokens[:, 0], "cls"), 0)
        patches = tokens[:, 1:].flatten(0, 1)[rows]
        return cls, self._targets(self._outputs(teacher, patches, "patch"), 1)

    def loss(self, views: list[Tensor]) -> Tensor:
        """The sum of all terms of a batch, two global crops first."""
        method, student, rate = self.work.method, self.networks.student, self.work.encoder.drop_path
        both = torch.cat(views[:2])
        weights = self.drawn["weights"]
        real = weights > 0
        rows = self.drawn["patches"][real]
        cls_target, patch_target = self._taught(both, rows)
        seen = self._tokens(student, both, self.drawn["masked"], rate)
        cls = [seen[:, 0]]
        if views[2:]:
            cls.append(self._tokens(student, torch.cat(views[2:]), None, rate)[:, 0])
        outputs = self._outputs(student, torch.cat(cls), "cls") / method.student_temp
        total = self._of_crops(cls_target.chunk(2), outputs.chunk(len(views)))
        logits = self._outputs(student, seen[:, 1:].flatten(0, 1)[rows], "patch")
        each = -(patch_target * (logits / method.student_temp).log_softmax(-1)).sum(-1)
        patches = (each * weights[real]).sum() / len(both)
        total = total + method.patch_weight * patches
        for crop in seen[:, 0].chunk(2) if method.koleo_weight else ():
            total = total + method.koleo_weight * self._koleo(crop)
        return total

    @staticmethod
    def _of_crops(targets: tuple[Tensor, ...], crops: tuple[Tensor, ...]) -> Tensor:
        """Cross-entropy of all pairs of different crops, pair by pair, over their number."""
        total, pairs = targets[0].new_zeros(()), 0
        for i, target in enumerate(targets):
            for v, logits in enumerate(crops):
                if v != i:
                    total = total - (target * logits.log_softmax(-1)).sum(-1).mean()
                    pairs += 1
        return total / pairs

    def _koleo(self, features: Tensor) -> Tensor:
        """KoLeo of groups of images, as each process of the original has one."""
        with torch.autocast(features.device.type, enabled=False):
            groups = features.float().split(self.work.method.koleo_images or len(features))
            logs = []
            for group in groups:
                x = F.normalize(group, eps=_EPS, dim=-1)
                near = (x @ x.T).detach().fill_diagonal_(-1).argmax(1)
                logs.append((F.pairwise_distance(x, x[near], eps=_EPS) + _EPS).log())
            return -torch.cat(logs).mean()

    def clip(self) -> None:
        """Gradient clipping of each network by its norm."""
        limit, student = self.work.optim.clip, self.networks.student
        rest = [student.vit.parameters(), *(head.parameters() for head in student.heads.values())]
        for parameters in rest if limit > 0 else []:
            torch.nn.utils.clip_grad_norm_(parameters, limit)

    @torch.no_grad()
    def move_teacher(self) -> None:
        """EMA update, one parameter after another."""
        keep, net = self.work.method.momentum, self.networks
        for part in ("vit", "heads"):
            pairs = zip(net.teacher[part].parameters(), net.student[part].parameters(), strict=True)
            for old, new in pairs:
                old.mul_(keep).add_((1 - keep) * new)


PEERS: dict[str, type[Peer]] = {"original": OriginalDINOv2}
CHAINS: dict[str, type[OriginalChain]] = {"original": OriginalChain}
