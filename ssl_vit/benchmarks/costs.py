"""Step cost: FLOPs and memory of a training step, counted on fake tensors without running it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from ssl_vit.common.errors import RunFailed
from ssl_vit.common.task import Task, Views
from ssl_vit.data.augment import ViewSpec
from ssl_vit.data.loader import draw_all, whole_boxes
from ssl_vit.model.execution import checkpoint_activations, choose_attention
from ssl_vit.training.footprint import KeptBytes, flop_counter
from ssl_vit.training.parallel import autocast

_CPU, _GPU = torch.device("cpu"), torch.device("cuda")


@dataclass(frozen=True)
class ActivationBytes:
    """Activation memory in bytes: ``per_image``, and ``fixed`` (weights cast to bfloat16)."""

    per_image: int
    fixed: int


@dataclass(frozen=True)
class StepCost:
    """Step cost.

    ``flops``: per image, forward and backward. ``kept``: activations that autograd keeps for the
    backward pass. ``recomputed``: activations kept with activation checkpointing, including those
    of the largest block while it is recomputed.
    """

    flops: int
    kept: ActivationBytes
    recomputed: ActivationBytes


@dataclass(frozen=True)
class StateBytes:
    """Training state in bytes, per process and independent of the batch size.

    ``weights``: parameters and buffers, trained or not. ``gradients`` and the optimizer's
    ``moments``: of the trained parameters, two of AdamW, one of Muon. ``gathered``: sharded
    parameters that stay gathered for the whole step.
    """

    weights: int
    gradients: int
    moments: int
    gathered: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.moments + self.gathered


def count_step(task: Task, spec: ViewSpec, channels: int) -> StepCost:
    """Step cost of a task in bfloat16, from its own forward and backward pass on fake tensors.

    The task, best built under ``without_memory()``, cannot be used afterwards. The count is that of
    a GPU: attention is fused, and keeps its inputs, its output and one number for each row. A
    multiplication and an addition are two FLOPs. Attention counts the products of its definition;
    recomputation, by kernels or by checkpointing, is not counted. Memory is extrapolated from
    batches of 2 and 3 images, from which on it grows linearly; temporary buffers of single
    operations are not included.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _no_reading(task):
        task.to_empty(device=_CPU)
        choose_attention(task, _GPU)
        with flop_counter() as counter:
            two = _step(task, spec, channels, 2)
        # What is kept is known before a backward pass, which takes longer than all else.
        three = _step(task, spec, channels, 3, backward=False)
        checkpoint_activations(task)
        less, more = (_step(task, spec, channels, n, backward=False) for n in (2, 3))
    blocks = [_linear(*block) for block in zip(two.blocks, three.blocks, strict=True)]
    left, largest = _linear(less.kept, more.kept), max(blocks, key=lambda block: block.per_image)
    recomputed = ActivationBytes(left.per_image + largest.per_image, left.fixed + largest.fixed)
    return StepCost(counter.get_total_flops() // 2, _linear(two.kept, three.kept), recomputed)


@contextmanager
def _no_reading(task: Task) -> Iterator[None]:
    """Context in which a step that reads numbers from the device is an error in words.

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


def _linear(two: int, three: int) -> ActivationBytes:
    """Linear model of memory through the bytes of 2 and of 3 images."""
    return ActivationBytes(per_image=three - two, fixed=3 * two - 2 * three)


@dataclass(frozen=True)
class _StepBytes:
    """Activation memory of one step in bytes: in total, and added by each transformer block."""

    kept: int
    blocks: list[int]


def _step(
    task: Task, spec: ViewSpec, channels: int, images: int, backward: bool = True
) -> _StepBytes:
    crops = [torch.empty(images * c.count, channels, *c.size) for c in spec.crops]
    keys, labels = (torch.empty(images, dtype=torch.int64) for _ in range(2))
    drawn = draw_all(spec, range(images))
    views = Views(crops, keys, labels, drawn=drawn, boxes=whole_boxes(spec, images))
    kept = _BlockBytes(task)
    task.train()
    with kept.watch(), kept.watch_blocks(task):
        with autocast(_CPU, torch.bfloat16):
            loss = task(views, 0)["loss"]
        held = kept.now()
        if backward:
            loss.backward()
    return _StepBytes(held, kept.of_blocks)


class _BlockBytes(KeptBytes):
    """Activation memory that also records the bytes each transformer block adds."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.of_blocks: list[int] = []
        self._before = 0

    @contextmanager
    def watch_blocks(self, module: nn.Module) -> Iterator[None]:
        """Context in which the calls of all transformer blocks of a module are recorded."""
        blocks = [part for part in module.modules() if isinstance(part, Block | EvaBlock)]
        handles = [block.register_forward_pre_hook(self._enter) for block in blocks]
        handles += [block.register_forward_hook(self._leave) for block in blocks]
        yield
        for handle in handles:
            handle.remove()

    def _enter(self, *_: object) -> None:
        self._before = self.now()

    def _leave(self, *_: object) -> None:
        self.of_blocks.append(self.now() - self._before)


def state_of(task: Task, muons: Collection[nn.Parameter] = ()) -> StateBytes:
    """Training state of a task that is not sharded, on any device.

    Args:
        muons: the parameters that Muon trains.
    """
    parameters = list(task.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return StateBytes(
        weights=_bytes(parameters) + _bytes(task.buffers()),
        gradients=_bytes(trained),
        moments=_moments(trained, muons),
    )


def sharded_state(task: Task, processes: int, muons: Collection[nn.Parameter] = ()) -> StateBytes:
    """Training state of a task sharded over ``processes`` (FSDP2), in the process with the most.

    Each parameter is divided by rows, rounded up; buffers are whole. Gathered for the whole step,
    as ``Parallel.shard`` does it: all parameters except attention and MLP of the blocks before the
    last of each sequence, their gradients, and a bfloat16 copy of their trained matrices. The one
    or two blocks that are gathered while they compute are not included.
    """
    parameters = list(task.parameters())
    trained = [p for p in parameters if p.requires_grad]
    gathered = _gathered(task)
    moving = [p for p in gathered if p.requires_grad]
    halves = _bytes(p for p in moving if p.ndim > 1) // 2
    return StateBytes(
        weights=_bytes(parameters, processes) + _bytes(task.buffers()),
        gradients=_bytes(trained, processes),
        moments=_moments(trained, muons, processes),
        gathered=_bytes(gathered) + _bytes(moving) + halves,
    )


def _moments(
    trained: list[nn.Parameter], muons: Collection[nn.Parameter], processes: int = 1
) -> int:
    two = [p for p in trained if p not in muons]
    return _bytes(trained, processes) + _bytes(two, processes)


def _gathered(task: Task) -> list[nn.Parameter]:
    """Parameters that FSDP2 keeps gathered for the whole step."""
    apart: set[int] = set()
    for sequence in task.modules():
        blocks = [child for child in sequence.children() if isinstance(child, Block | EvaBlock)]
        for block in blocks[:-1]:
            parts = (*block.attn.parameters(), *block.mlp.parameters())
            apart |= {id(p) for p in parts}
    return [p for p in task.parameters() if id(p) not in apart]


def _bytes(tensors: Iterable[Tensor], processes: int = 1) -> int:
    """Bytes of tensors; with several processes, of the rows that the first one holds."""
    return sum(
        (-(-len(t) // processes) * (t.numel() // len(t)) if processes > 1 else t.numel())
        * t.element_size()
        for t in tensors
    )


def largest_batch(room: float, state: StateBytes, kept: ActivationBytes) -> int:
    """Largest batch (images) whose state and activations fit into ``room`` bytes; 0: none fits."""
    fixed = 0 if state.gathered else kept.fixed  # the gathered state has the bfloat16 weights
    return max(0, int((room - state.total - fixed) // kept.per_image))
