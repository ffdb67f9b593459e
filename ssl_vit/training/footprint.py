"""Step footprint: floating-point operations and memory, by part, of a training step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit.common.distributed import local
from ssl_vit.common.free_memory import free_memory_here
from ssl_vit.data.batch import Batch
from ssl_vit.model.block import nothing_spared
from ssl_vit.training.loop import Trainer
from ssl_vit.training.muon import by_muon, orthogonalizing

# Fused kernels of attention, of CPUs and of CUDA.
_FUSED = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")


@dataclass(frozen=True)
class Memory:
    """Memory in bytes that a process holds at the start of a backward pass, by part.

    ``weights``: parameters and buffers, trained or not. ``gradients``, ``moments``: of the trained
    ones; of a sharded parameter, this process's rows. ``activations``: tensors saved by autograd;
    under bfloat16 the cast weights too. Temporary buffers of single operations are not included,
    nor, with activation checkpointing, the recomputed activations of one block.
    """

    weights: float
    gradients: float
    moments: float
    activations: float

    @property
    def state(self) -> float:
        """Bytes that do not depend on the batch."""
        return self.weights + self.gradients + self.moments

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return self.state + self.activations


class _Held:
    """Handle of a storage that autograd has saved; lives as long as autograd refers to it."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage


class KeptBytes:
    """Saved activations: peak bytes that autograd saved for a backward pass inside ``watch()``.

    Distinct storages are counted, without those of parameters and buffers. They are measured when
    the backward pass begins: weights gathered for a single block are freed by then.
    """

    def __init__(self, module: nn.Module) -> None:
        self.most = 0
        self._held: WeakValueDictionary[int, _Held] = WeakValueDictionary()
        self._own = {local(t).untyped_storage()._cdata for t in _tensors(module)}
        self._forward = False

    def watch(self) -> saved_tensors_hooks:
        """Context manager inside which saved tensors are tracked."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> tuple[Tensor, _Held | None]:
        self._forward = True
        base = tensor if tensor._base is None else tensor._base
        storage = tensor.untyped_storage()
        place = storage._cdata  # not the data pointer: fake tensors have none
        if place in self._own or isinstance(base, nn.Parameter):
            return tensor, None
        held = self._held.get(place)
        if held is None:
            held = self._held[place] = _Held(storage)
        return tensor, held

    def _unpack(self, packed: tuple[Tensor, _Held | None]) -> Tensor:
        if self._forward:
            self._forward = False
            self.most = max(self.most, self.now())
        return packed[0]

    def now(self) -> int:
        """Bytes of the saved tensors that a backward pass still needs."""
        return sum(held.storage.nbytes() for held in self._held.values())


def measure_step(trainer: Trainer, parts: list[Batch]) -> tuple[int, int]:
    """Measure an uncompiled optimizer step of this process: (FLOPs, bytes saved for backward).

    A multiplication and an addition are two FLOPs; matrix products, convolutions and attention are
    counted, forward and backward; not those of the optimizer. With stochastic depth, which skips
    some of both, the result is the maximum: nothing is skipped.
    """
    kept = KeptBytes(trainer.task)
    trainer.task.train()
    with _eager(trainer), nothing_spared(trainer.task), flop_counter() as flops, kept.watch():
        trainer.update(parts)
    return flops.get_total_flops() - optimizer_flops(trainer), kept.most


def optimizer_flops(trainer: Trainer) -> int:
    """FLOPs of the optimizer in the last step, which do not depend on the batch."""
    return orthogonalizing(p for p in by_muon(trainer.optimizer) if p.grad is not None)


def flop_counter() -> FlopCounterMode:
    """FLOP counter of attention without the products that a fused kernel's backward recomputes."""
    formulas: dict[Any, Any] = {}
    for kernel in _FUSED:
        name = f"_scaled_dot_product_{kernel}"
        formulas[getattr(torch.ops.aten, name)] = _attention
        backward = name + "_backward"
        formulas[getattr(torch.ops.aten, backward)] = _attention_backward
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of attention over shapes (b, heads, n, d): scores, and weighted values."""
    return int(2 * math.prod(query[:3]) * key[2] * (query[3] + value[3]))


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """FLOPs of the backward pass: of each product, the gradients of both factors."""
    return 2 * _attention(query, key, value)


def _eager(trainer: Trainer) -> AbstractContextManager[Any]:
    """Eager mode: operations inside compiled blocks could not be counted."""
    return torch.compiler.set_stance("force_eager") if trainer.run.compile else nullcontext()


def memory_of(trainer: Trainer, activations: float) -> Memory:
    """Memory by part, after a step, when gradients and moments exist.

    Where a parameter has none yet (a layer that is frozen at first), those it will have.
    """
    gradients = [p if p.grad is None else p.grad for p in trainer.trained]
    moments, one = 0, by_muon(trainer.optimizer)
    for parameter in trainer.trained:
        state = trainer.optimizer.state.get(parameter, {}).values()
        tensors = [t for t in state if isinstance(t, Tensor)]
        expected = (1 if parameter in one else 2) * nbytes([parameter])
        moments += nbytes(tensors) if tensors else expected
    weights = nbytes(_tensors(trainer.task))
    return Memory(float(weights), float(nbytes(gradients)), float(moments), activations)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this process's part of the tensors; shared memory counts once."""
    storages = [local(t).untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def free_memory(device: torch.device, processes: int) -> float:
    """Free memory: bytes that a process may still allocate on its device; infinite if unknown.

    ``processes``: of this run on this machine, which share its memory if they train on CPUs.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return free_memory_here() / processes if device.type == "cpu" else float("inf")


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
