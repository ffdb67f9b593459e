"""Execution of transformer blocks: compilation, recomputation in backward, choice of attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ssl_vit.common.errors import check
from ssl_vit.model.block import LeanResidual

# Graphs of one function, above which torch compiles no more: one of each size of crops, with
# gradients and without, of all tokens and of [CLS] alone.
_GRAPHS = 64


def compile_blocks(module: nn.Module, in_parts: bool = False) -> None:
    """Compile every transformer block of a module in place; its weights keep their names.

    A block's draws of stochastic depth stay outside, so that blocks of any probability share
    kernels. ``in_parts``: norms, attention and MLP apart, as where something happens between them.
    Each size of crops has kernels of its own: there are few sizes, and kernels for any size are
    slower.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)
    for block in module.modules():
        if isinstance(block, LeanResidual):
            block.whole, block.compiled = True, not in_parts
            own: Any = block
            for part in [own.norm1, own.attn, own.norm2, own.mlp] if in_parts else []:
                part.compile(dynamic=False)


def nothing_compiled(compiled: bool) -> AbstractContextManager[object]:
    """Context in which ``compiled`` blocks run as they were written: a probe has sizes of batches
    and of images of its own, for each of which the compiler would make other kernels.

    The compiler is not so much as imported where nothing was.
    """
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def checkpoint_activations(module: nn.Module) -> None:
    """Make every transformer block of a module forget its activations until backward, in place.

    That costs a second forward pass of the blocks and saves most of the memory of training. Names
    of weights, numbers and gradients stay. Call it before blocks are sharded (FSDP); before or
    after :func:`compile_blocks`.

    Raises:
        UserError: the module has no such block.
    """
    blocks = [part for part in module.modules() if isinstance(part, LeanResidual)]
    check(bool(blocks), "--run.activation-checkpointing is for plain ViTs; here is none")
    for block in blocks:
        block.recomputes = True


def choose_attention(module: nn.Module, device: torch.device) -> None:
    """Fused attention kernels where they are the faster ones: on GPUs, not on CPUs. On CUDA its
    shapes stay the same from step to step.

    On CPUs torch's fused kernel was measured 1.6 to 8 times slower in bfloat16 than plain
    matmul-softmax-matmul, forward and backward. On CUDA blocks compute what stochastic depth drops,
    too: else each draw makes shapes of its own, for which kernels are chosen, and memory is cut,
    anew; and at the usual rate of 0.1 picking rows moves as many bytes as it saves.
    """
    _fuse_attention(module, device.type != "cpu")
    for part in module.modules():
        if isinstance(part, LeanResidual) and device.type == "cuda":
            part.whole = True


def repeatable_attention(module: nn.Module) -> None:
    """Attention by matrix products, in place, for scores that repeat: the gradients of CUDA's fused
    kernels are summed in any order."""
    _fuse_attention(module, False)


def _fuse_attention(module: nn.Module, fused: bool) -> None:
    part: Any
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
