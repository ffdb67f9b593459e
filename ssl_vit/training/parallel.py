"""Processes and devices: single-device code is wrapped from here."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ssl_vit.config import UserError, check
from ssl_vit.task import Task

# Rank 0 looks at the encoder while the others wait for it in the next step.
_TIMEOUT = timedelta(minutes=60)
# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Parallel:
    """This process among all: its rank, how many there are, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def wrap(self, task: Task) -> nn.Module:
        """The task with gradients averaged over processes; itself when there is one."""
        if self.world == 1:
            return task
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            task, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any process; all must call it."""
        if self.world == 1:
            return flag
        seen = torch.tensor(float(flag))  # on the CPU, by gloo: no GPU is waited for
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return bool(seen.item())

    def check_agreement(self, what: str, value: int) -> None:
        """Refuse to go on where processes differ in ``value``; all must call it.

        Raises:
            UserError: they differ; ``what`` is named.
        """
        if self.world > 1:
            ends = torch.tensor([value, -value])
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
            high, low = int(ends[0]), -int(ends[1])
            check(high == low, f"{what} differs between processes: {low} to {high}")


def start_parallel(device: str) -> Parallel:
    """Join the processes that ``torchrun`` started; alone without it.

    Raises:
        UserError: a device that this machine does not have.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = resolve_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    reuse_memory(chosen)
    return Parallel(rank, world, chosen)


def stop_parallel() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that ``auto``, ``cuda`` ... means for process ``local_rank`` of this machine.

    Raises:
        UserError: a device that this machine does not have.
    """
    if name == "auto":
        # Gloo carries no MPS tensors, so several processes on a Mac use its CPU.
        mps = torch.backends.mps.is_available() and "WORLD_SIZE" not in os.environ
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"the device is {name!r}; allowed: auto, cpu, cuda, cuda:1 or mps"
        ) from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if device.index is None else device.index
        check(index < count, f"the device is {name!r}; this machine has {count} CUDA devices")
        return torch.device("cuda", index)
    there = device.type == "cpu" or (device.type == "mps" and torch.backends.mps.is_available())
    check(there, f"the device is {name!r}; this machine does not have it")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype that ``auto``, ``bf16`` or ``fp32`` means on a device.

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
    """The autocast context of a precision on a device; does nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_workers(asked: int, device: torch.device) -> int:
    """Loader processes for one training process: as asked, or its share of the machine's cores.

    Half that share where the cores also compute.
    """
    if asked >= 0:
        return asked
    # Slurm has bound each task to its own cores already.
    bound = "SLURM_CPUS_PER_TASK" in os.environ
    local = 1 if bound else int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    share = cores() // local // (2 if device.type == "cpu" else 1)
    return max(1, min(16, share))


def reuse_memory(device: torch.device) -> None:
    """On Linux CPUs let the C library keep what tensors free, rather than return it to the kernel.

    Every step allocates the same tensors. By default glibc maps and unmaps large ones each time,
    and the kernel fills their pages with zeros again: 6 times the page faults, and a tenth of the
    step, in a ViT-Ti MAE.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library, with its own habits
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
