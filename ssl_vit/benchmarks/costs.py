"""What a training step takes, counted and not taken: its tensors have shapes and no memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from ssl_vit.common.config import RunFailed
from ssl_vit.common.task import Task, Views
from ssl_vit.data.augment import ViewSpec
from ssl_vit.data.loader import draw_samples
from ssl_vit.model.encoder import checkpoint_activations, choose_attention
from ssl_vit.training.footprint import KeptBytes, flop_counter
from ssl_vit.training.parallel import autocast

_CPU, _GPU = torch.device("cpu"), torch.device("cuda")


@dataclass(frozen=True)
class Kept:
    """Bytes of activations: ``per_image`` of a batch, and ``fixed`` ones (weights in bfloat16)."""

    per_image: int
    fixed: int


@dataclass(frozen=True)
class StepCost:
    """What a step takes.

    ``flops``: of an image, forward and backward. ``kept``: what autograd keeps for the backward
    pass. ``recomputed``: what is left of that with activation checkpointing; what the largest block
    then computes again is part of it.
    """

    flops: int
    kept: Kept
    recomputed: Kept


@dataclass(frozen=True)
class State:
    """Bytes that a process holds whatever the batch.

    ``weights``: parameters and buffers, trained or not. ``gradients`` and AdamW's ``moments``: of
    the trained ones. ``gathered``: of sharded ones what is put together for the whole step.
    """

    weights: int
    gradients: int
    moments: int
    gathered: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return self.weights + self.gradients + self.moments + self.gathered


def count_step(task: Task, spec: ViewSpec, channels: int) -> StepCost:
    """Count a step of a task in bfloat16, by its own forward and backward pass without numbers.

    The task, best built under ``without_memory()``, is of no use after it. Counted is what a GPU
    runs: attention is fused, and keeps its inputs, its output and one number for each row. A
    multiplication and an addition are two FLOPs. Of attention the products of its definition are
    counted, whatever a kernel computes again, and nothing that checkpointing computes again.
    Memory follows from batches of 2 and of 3 images, from where on it grows evenly; temporary
    buffers of single operations come on top.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _no_reading(task):
        task.to_empty(device=_CPU)
        choose_attention(task, _GPU)
        with flop_counter() as counter:
            two = _step(task, spec, channels, 2)
        three = _step(task, spec, channels, 3)
        checkpoint_activations(task)
        less, more = (_step(task, spec, channels, images) for images in (2, 3))
    blocks = [_line(*block) for block in zip(two.blocks, three.blocks, strict=True)]
    left, largest = _line(less.kept, more.kept), max(blocks, key=lambda block: block.per_image)
    recomputed = Kept(left.per_image + largest.per_image, left.fixed + largest.fixed)
    return StepCost(counter.get_total_flops() // 2, _line(two.kept, three.kept), recomputed)


@contextmanager
def _no_reading(task: Task) -> Iterator[None]:
    """Inside, a step that reads numbers from the device is an error in words.

    Raises:
        RunFailed: it does: nothing can be counted without numbers, and a GPU would be waited for.
    """
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise RunFailed(
            f"a step of {type(task).__name__} reads numbers from the device ({error.func}), as "
            ".item(), nonzero, a boolean index or an if on a tensor do: its cost cannot be "
            "counted, and a GPU is waited for in every step. Draw fixed shapes in Method.draw, and "
            "use torch.where"
        ) from None


def _line(two: int, three: int) -> Kept:
    """From what 2 and what 3 images take."""
    return Kept(per_image=three - two, fixed=3 * two - 2 * three)


@dataclass(frozen=True)
class _Step:
    """Bytes kept, and those that each call of a transformer block added."""

    kept: int
    blocks: list[int]


def _step(task: Task, spec: ViewSpec, channels: int, images: int) -> _Step:
    crops = [torch.empty(images * c.count, channels, *c.size) for c in spec.crops]
    keys, labels = (torch.empty(images, dtype=torch.int64) for _ in range(2))
    drawn = draw_samples(spec.draw, range(images)) if spec.draw else {}
    views = Views(crops, keys, labels, drawn=drawn)
    kept = _OfBlocks(task)
    task.train()
    with kept.watch(), kept.watch_blocks(task):
        with autocast(_CPU, torch.bfloat16):
            loss = task(views, 0)["loss"]
        loss.backward()
    return _Step(kept.most, kept.of_blocks)


class _OfBlocks(KeptBytes):
    """What each call of a transformer block adds, too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.of_blocks: list[int] = []
        self._before = 0

    @contextmanager
    def watch_blocks(self, module: nn.Module) -> Iterator[None]:
        """A context in which it looks at every transformer block of a module."""
        blocks = [part for part in module.modules() if isinstance(part, Block)]
        handles = [block.register_forward_pre_hook(self._enter) for block in blocks]
        handles += [block.register_forward_hook(self._leave) for block in blocks]
        yield
        for handle in handles:
            handle.remove()

    def _enter(self, *_: object) -> None:
        self._before = self._bytes()

    def _leave(self, *_: object) -> None:
        self.of_blocks.append(self._bytes() - self._before)

    def _bytes(self) -> int:
        return sum(held.storage.nbytes() for held in self._held.values())


def state_of(task: Task) -> State:
    """What a process holds of a task that is not sharded, on any device."""
    parameters = list(task.parameters())
    trained = _bytes(p for p in parameters if p.requires_grad)
    return State(_bytes(parameters) + _bytes(task.buffers()), trained, 2 * trained)


def sharded_state(task: Task, processes: int) -> State:
    """What the process that has most holds of a task sharded over ``processes`` (FSDP2).

    Each parameter is divided by rows, rounded up; buffers are whole. Gathered for the whole step,
    as ``Parallel.shard`` does it: all but attention and MLP of the blocks before the last of each
    sequence, its gradients, and its trained matrices in bfloat16 once more. The one or two blocks
    that are gathered while they compute come on top.
    """
    parameters = list(task.parameters())
    trained = [p for p in parameters if p.requires_grad]
    own = _bytes(trained, processes)
    gathered = _gathered(task)
    moving = [p for p in gathered if p.requires_grad]
    halves = _bytes(p for p in moving if p.ndim > 1) // 2
    return State(
        weights=_bytes(parameters, processes) + _bytes(task.buffers()),
        gradients=own,
        moments=2 * own,
        gathered=_bytes(gathered) + _bytes(moving) + halves,
    )


def _gathered(task: Task) -> list[nn.Parameter]:
    """The parameters that FSDP2 holds whole through a step."""
    apart: set[int] = set()
    for sequence in task.modules():
        blocks = [child for child in sequence.children() if isinstance(child, Block)]
        for block in blocks[:-1]:
            parts = (*block.attn.parameters(), *block.mlp.parameters())
            apart |= {id(p) for p in parts}
    return [p for p in task.parameters() if id(p) not in apart]


def _bytes(tensors: Iterable[Tensor], processes: int = 1) -> int:
    """Bytes of tensors; of the rows of each that the first of several processes has."""
    return sum(
        (-(-len(t) // processes) * (t.numel() // len(t)) if processes > 1 else t.numel())
        * t.element_size()
        for t in tensors
    )


def largest_batch(room: float, state: State, kept: Kept) -> int:
    """Images at once for which state and activations take at most ``room`` bytes; 0: none."""
    fixed = 0 if state.gathered else kept.fixed  # gathered ones have their weights in bfloat16
    return max(0, int((room - state.total - fixed) // kept.per_image))
