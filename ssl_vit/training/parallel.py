"""Distributed training: processes, devices, DDP and FSDP2 around single-device code."""

from __future__ import annotations

import ctypes
import inspect
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ssl_vit.common.errors import UserError, check
from ssl_vit.common.task import Task
from ssl_vit.common.waiting import usable_cores
from ssl_vit.training.launched import launched
from ssl_vit.training.watchdog import Watchdog

# Share of the process group's timeout after which hung processes are reported.
_WATCHED_SHARE = 0.75
# Constants of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Parallel:
    """Process layout: this process' rank, the world size, its device, and how work is shared."""

    rank: int
    world: int
    device: torch.device
    kind: Literal["ddp", "fsdp"] = "ddp"

    @property
    def main(self) -> bool:
        """True if this process writes files and logs."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """True if each process holds only its part of the weights."""
        return self.kind == "fsdp" and self.world > 1

    def shard(self, task: Task, precision: torch.dtype) -> None:
        """Shard the weights in place (FSDP2): each process keeps its part. Before the optimizer is
        made. Does nothing unless ``sharded``.

        Attention and MLP of each transformer block are gathered while they compute, in the
        precision they compute in; gradients are summed in float32. The last block of each sequence
        belongs to the root group, with all weights outside of blocks, gathered for the whole step
        in float32: the backward pass needs it first.
        """
        if not self.sharded:
            return
        mesh = init_device_mesh(self.device.type, (self.world,))
        for sequence in task.modules():
            blocks = [child for child in sequence.children() if isinstance(child, Block | EvaBlock)]
            for part in [part for block in blocks[:-1] for part in (block.attn, block.mlp)]:
                # Autocast rounds the weights of linear layers too, but not those of norms.
                linear = all(isinstance(m, nn.Linear) for m in part.modules() if own_weights(m))
                half = torch.bfloat16 if linear and precision == torch.bfloat16 else None
                policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
                fully_shard(part, mesh=mesh, mp_policy=policy)
        fully_shard(task, mesh=mesh)

    def wrap(self, task: Task) -> nn.Module:
        """DDP wrapper, which averages gradients over processes; the task if alone or sharded."""
        if self.world == 1 or self.sharded:
            return task
        # A harmless warning, repeated by every process: the patch embedding, one small tensor.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        devices = [self.device] if self.device.type == "cuda" else None
        options: dict[str, Any] = {"device_ids": devices, "gradient_as_bucket_view": True}
        # Renamed in newer releases.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        newer = "forward_sync_buffers"
        options[newer if newer in known else "broadcast_buffers"] = False
        return DistributedDataParallel(task, **options)

    def sync(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Context manager around a part of a step: only the last part reduces gradients."""
        if isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        return nullcontext()

    def most(self, *values: float | int) -> tuple[float | int, ...]:
        """Maximum of each value over processes; all must call it."""
        if self.world == 1:
            return values
        # On the CPU, by gloo: does not wait for a GPU.
        seen = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        largest: list[float] = seen.tolist()
        return tuple(largest)

    def meet(self) -> None:
        """Wait for all processes, on the host; all must call it.

        Before anything is read from a device: where another process is gone, its kernels wait for
        ever in a collective, and so would the reading host, but this raises.
        """
        self.most(0)

    def any(self, flag: bool) -> bool:
        """True if ``flag`` is true on any process; all must call it."""
        return bool(self.most(flag)[0])

    def first(self, texts: Sequence[str]) -> str:
        """First non-empty text of ``gather_texts``, with its process unless it is the main one."""
        rank = next(i for i, text in enumerate(texts) if text)
        return f"process {rank}: {texts[rank]}" if rank else texts[rank]

    def watchdog(self, minutes: float) -> Watchdog:
        """Watchdog that reports a hung process before the process group's timeout; on CUDA, where
        the host may hang in a read that has no timeout, it ends this one where another is gone."""
        ends = self.device.type == "cuda"
        return Watchdog(self.rank, self.world, 60 * minutes * _WATCHED_SHARE, ends=ends)

    def check_agreement(self, what: str, value: int) -> None:
        """Check that ``value`` is equal on all processes; all must call it.

        Raises:
            UserError: they differ; ``what`` is named.
        """
        high, low = self.most(value, -value)
        check(high == -low, f"{what} differs between processes: {-low:.0f} to {high:.0f}")


def own_weights(module: nn.Module) -> bool:
    """True if a module has weights outside of the modules in it."""
    return any(True for _ in module.parameters(recurse=False))


def start_parallel(
    device: str, kind: Literal["ddp", "fsdp"] = "ddp", minutes: float = 60.0
) -> Parallel:
    """Join the process group that ``torchrun`` or Slurm started; a single process without one.

    Args:
        minutes: how long a process waits for another.

    Raises:
        UserError: a device that this machine does not have.
    """
    own = launched()
    chosen = resolve_device(device, own.local_rank)
    prepare_device(chosen)  # before the group, whose NCCL would take the first GPU in each process
    if own.world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    return Parallel(own.rank, own.world, chosen, kind)


def prepare_device(device: torch.device) -> None:
    """Set this process up for its device, before anything is computed."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    exact_kernels(device)
    reuse_memory(device)


def exact_kernels(device: torch.device) -> None:
    """Switch off what is not exact on CUDA, for the whole process.

    That is cuDNN's attention: it plans for each shape, batch included, and its gradients of a
    single query were reported as NaN; and TF32 in cuDNN's convolutions: float32 means it.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cudnn.allow_tf32 = False


def stop_parallel() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Device that ``auto``, ``cuda`` ... stands for, for process ``local_rank`` of this machine.

    Raises:
        UserError: a device that this machine does not have.
    """
    if name == "auto":
        # Gloo carries no MPS tensors, so several processes on a Mac use its CPU.
        mps = torch.backends.mps.is_available() and launched().world == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"the device is {name!r}; allowed: auto, cpu, cuda, cuda:1 or mps"
        ) from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        # Slurm may make only its own device visible to each process, which is then number 0.
        own = 0 if count == 1 and by_slurm() else local_rank
        index = own if device.index is None else device.index
        asked = name if device.index is not None else f"{name}, of process {index} of this machine"
        check(index < count, f"the device is {asked}; there are {count} CUDA devices")
        return torch.device("cuda", index)
    there = device.type == "cpu" or (device.type == "mps" and torch.backends.mps.is_available())
    check(there, f"the device is {name!r}; this machine does not have it")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Compute dtype that ``auto``, ``bf16`` or ``fp32`` stands for on a device.

    ``auto`` is bfloat16 wherever the hardware multiplies it (CPUs with AVX512-BF16 or AMX too).
    """
    if name == "auto":
        name = "bf16" if _has_bf16(device) else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Autocast context of a precision on a device; does nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)


def casts_kept(device: torch.device) -> torch.autocast:
    """Cached casts: inside, autocast rounds each weight once, not again in each part of a step.

    Autocast caches rounded copies of trained weights until its outermost context ends, here after
    the last part. Weights must not change inside.
    """
    return torch.autocast(device.type, enabled=False)


def by_slurm() -> bool:
    """True if Slurm started this process directly, not by ``torchrun`` (inside a job or not)."""
    return "SLURM_PROCID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def own_cores() -> int:
    """Processor cores of this process alone: its share of those it may use.

    Under Slurm it may already be bound to its own.
    """
    bound = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) if by_slurm() else 0
    cores = len(usable_cores())
    return cores if 0 < cores <= bound else max(1, cores // launched().local_world)


def loader_workers(asked: int, device: torch.device) -> int:
    """Loader workers for one training process: as asked, or its share of the machine's cores.

    Half that share where the cores also compute.
    """
    if asked >= 0:
        return asked
    share = own_cores() // (2 if device.type == "cpu" else 1)
    return max(1, min(16, share))


def reuse_memory(device: torch.device) -> None:
    """Memory reuse: on Linux CPUs, malloc keeps freed memory rather than return it to the kernel.

    Every step allocates the same tensors. By default glibc maps and unmaps large ones each time,
    and the kernel fills their pages with zeros again: 6 times the page faults, and a tenth of the
    step, where a ViT-Ti sees a quarter of its patches.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    # Older releases of glibc refuse more than 32 MiB. With the second call alone all tensors
    # from 128 KiB on would be mapped anew each time: worse than the default, which adapts.
    if any(mallopt(_M_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25)):
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
