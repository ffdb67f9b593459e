"""Optimizer: AdamW or Muon with a task's decay and learning-rate rules; non-finite updates are
skipped."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import AdamW

from ssl_vit.common.config import OptimConfig, RunConfig
from ssl_vit.common.distributed import all_reduce_mean, rank_and_world
from ssl_vit.common.errors import check
from ssl_vit.common.schedules import Length, warmup_cosine
from ssl_vit.common.task import Task
from ssl_vit.training.muon import Muon, block_matrices, by_muon


def make_optimizer(
    task: Task, config: OptimConfig, precision: torch.dtype = torch.float32
) -> AdamW:
    """Fused AdamW over the trained parameters, one group per (decays, lr scale, whether it is the
    encoder's, whether Muon trains it), largest first.

    Raises:
        UserError: Muon is asked for, and nothing that is trained is a matrix of a block.
    """
    groups: dict[tuple[bool, float, bool, bool], list[nn.Parameter]] = {}
    muons = block_matrices(task) if config.name == "muon" else set()
    for name, parameter in task.named_parameters():
        if task.trains(name, parameter):
            place = task.place_of(name)
            scale = task.lr_scale(name) * config.scale_of(*place)
            kind = task.decays(name, parameter), scale, place.encoder, parameter in muons
            groups.setdefault(kind, []).append(parameter)
    made = [
        {
            "params": groups[decays, scale, encoder, muon],
            "weight_decay": config.weight_decay if decays else 0.0,
            "decays": decays,
            "lr_scale": scale,
            "encoder": encoder,
            "muon": muon,
        }
        for decays, scale, encoder, muon in sorted(groups, reverse=True)
    ]
    options: dict[str, Any] = {"lr": config.peak_lr, "betas": config.betas, "fused": True}
    if config.name == "adamw":
        return AdamW(made, **options)
    check(
        any(group["muon"] for group in made),
        "--optim.name is 'muon', which trains weight matrices of a plain ViT's blocks, and none "
        "are trained here; give adamw",
    )
    return Muon(made, half=precision == torch.bfloat16, **options)


def set_rates(optimizer: AdamW, lr: float, weight_decay: float, encoder: float = 1.0) -> None:
    """Set the learning rate (scaled for each group; the encoder's by ``encoder``, too) and weight
    decay (where it applies)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"] * (encoder if group["encoder"] else 1.0)
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


class Schedule:
    """Schedule: learning rate and weight decay as functions of the step, from the options.

    Attributes:
        frozen, released: steps in which the encoder does not move, and then those in which its rate
            rises to its own.
    """

    def __init__(
        self,
        run: RunConfig,
        optim: OptimConfig,
        steps_per_epoch: int,
        peak_in_warmup: bool = False,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.total = max(1, Length.parse(run.length, "--run.length").steps(steps_per_epoch))
        asked = Length.parse(optim.warmup, "--optim.warmup").steps(steps_per_epoch)
        # A run shorter than its warm-up would never reach its learning rate.
        self.warmup = min(asked, self.total // 2)
        self.shortened = asked if asked > self.warmup else 0
        self.optim, self.peak_in_warmup = optim, peak_in_warmup
        names = "--optim.freeze-encoder", "--optim.release"
        spans = (Length.parse(*s, share=True) for s in zip(optim.held_back(), names, strict=True))
        self.frozen, self.released = (span.steps(steps_per_epoch, self.total) for span in spans)

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step ``step``, counted from 0."""
        optim = self.optim
        if self.peak_in_warmup and self.warmup > 0 and step < self.warmup:
            return optim.peak_lr * step / max(1, self.warmup - 1)
        peak, end = optim.peak_lr, optim.min_lr
        return warmup_cosine(step, warmup=self.warmup, total=self.total, peak=peak, end=end)

    def encoder_share(self, step: int) -> float:
        """Share of its own rate that the encoder has at a step: 0 while it is frozen."""
        since = step - self.frozen
        if since < 0:
            return 0.0
        return min(1.0, since / self.released) if self.released else 1.0

    def weight_decay(self, step: int) -> float:
        """Weight decay of optimizer step ``step``: constant, or half a cosine to its end."""
        start, end = self.optim.weight_decay, self.optim.weight_decay_end
        if end is None:
            return start
        return warmup_cosine(step, warmup=0, total=self.total, peak=start, end=end)


def encoder_rates(schedule: Schedule, optim: OptimConfig) -> list[tuple[str, str]]:
    """A row on the encoder's learning rate, where it is not that of the heads."""
    said = []
    if schedule.frozen >= schedule.total:
        said.append("frozen for the whole run: it never moves")
    elif schedule.frozen:
        said.append(f"frozen for {schedule.frozen:,} steps")
    if schedule.released and schedule.frozen < schedule.total:
        said.append(f"rises from 0 to its own over {schedule.released:,}")
    factors = {
        "": optim.scale_of(True, 0, False),
        "less from block to block, ": optim.scale_of(False, 1, False),
        "patch embedding ": optim.scale_of(False, 0, True),
    }
    said += [f"{name}x {factor:g}" for name, factor in factors.items() if factor != 1]
    return [("encoder's rate", "; ".join(said))] if said else []


def optimizer_parts(optimizer: AdamW) -> list[tuple[str, str]]:
    """A row on what Muon trains, where it does."""
    muons = by_muon(optimizer)
    if not muons:
        return []
    count = sum(p.numel() for p in muons)
    share = count / sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    what = f"{len(muons)} matrices of blocks, {share:.0%} of the trained parameters"
    return [("optimizer", f"Muon for {what}; AdamW for all else")]


class SpikeGuard:
    """Loss spike detection: by a running mean and variance of the previous losses.

    Args:
        deviations: how many standard deviations above the mean count as a spike; 0: disabled.
    """

    window = 100  # steps of the running mean; nothing is a spike before that many

    def __init__(self, deviations: float, device: torch.device) -> None:
        self.deviations = deviations
        zeros = (torch.zeros((), device=device) for _ in range(3))
        self.state = dict(zip(("loss_mean", "loss_variance", "losses"), zeros, strict=True))

    def passes(self, loss: Tensor) -> Bool[Tensor, ""]:
        """True if a step of this loss (this process' own) is no spike; the same on every process.

        The loss is then added to the running statistics; a spike is clamped to the limit, so that
        a lasting change of level is soon accepted. All on the device.
        """
        if not self.deviations:
            return torch.ones_like(loss, dtype=torch.bool)
        loss = all_reduce_mean(loss.detach().float())
        mean, variance, count = self.state.values()
        limit = mean + self.deviations * variance.sqrt()
        spike = (loss > limit) & (count >= self.window)
        seen = torch.where(spike, limit, loss)
        seen = torch.where(torch.isfinite(seen), seen, mean)
        share = 1 / (count + 1).clamp(max=self.window)
        step = seen - mean
        # West (1979), with the weights of a moving average once the window is full.
        variance.copy_((1 - share) * (variance + share * step.square()))
        mean.add_(share * step)
        count.add_(1)
        return ~spike


def guarded_step(optimizer: AdamW, takes: Tensor) -> Bool[Tensor, ""]:
    """Guarded optimizer step: changes nothing, moments included, where ``takes`` is false.

    Returns whether it was true on every process, so that the step was applied.
    The decision stays on the device: fused AdamW reads a ``found_inf`` flag, as it does for a
    gradient scaler, so the host does not wait for it.
    """
    found = (~takes).float().reshape(())
    if rank_and_world()[1] > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if found.device.type == "mps":  # its fused kernel ignores the flag
        if not bool(found):
            optimizer.step()
        return found == 0
    optimizer.found_inf = found  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()
    return found == 0
