"""Sharded state: the rows of a task and its optimizer that each process holds or writes.

Process r of w has the r-th of ``torch.chunk(tensor, w)``, as FSDP2 shards its parameters. Where
every process holds a whole tensor it writes only those rows: files do not depend on how the
processes share the work, and any number of processes can read them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ssl_vit.common.distributed import local, own_rows, rows_of, sharded_like, whole
from ssl_vit.common.errors import check
from ssl_vit.training.muon import MUONS_MOMENT, by_muon
from ssl_vit.weights.exchange import check_names_and_shapes
from ssl_vit.weights.own_files import read_metadata

T = TypeVar("T", bound=nn.Module)


def own_part(
    state: Mapping[str, Tensor], whole: set[str], rank: int, world: int
) -> dict[str, Tensor]:
    """Part of a state that process ``rank`` writes, copied to the CPU.

    Tensors named in ``whole``, and scalars, are written by the first process.
    """
    part, scalars = {}, {} if rank else _scalars(state)
    for name, value in state.items():
        if isinstance(value, DTensor):
            value = local(value)
        elif name not in whole and value.ndim:
            value = value.detach()[rows_of(len(value), rank, world)]
        elif name in scalars:
            part[name] = scalars[name]
            continue
        elif rank:
            continue
        part[name] = value.detach().to("cpu", copy=True).contiguous()
    return part


def _scalars(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars of a state on the CPU, in one copy of each kind: AdamW counts the steps of each
    parameter on its own."""
    kinds: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, value in state.items():
        if not (value.ndim or isinstance(value, DTensor)):
            kinds.setdefault((value.device, value.dtype), {})[name] = value.detach()
    return {
        name: value.clone()
        for some in kinds.values()
        for name, value in zip(some, torch.stack(list(some.values())).cpu(), strict=True)
    }


def moments(task: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Optimizer tensors, named ``parameter::tensor``."""
    names: dict[Tensor, str] = {p: n for n, p in task.named_parameters()}
    return {
        f"{names[p]}::{key}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


class Parts:
    """Reader of tensors that are split by rows over several safetensors files.

    Raises:
        UserError: a file is not a safetensors file, or lacks rows of a tensor.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        for path in paths:
            read_metadata(path)  # raises UserError for anything else
        self.where = str(paths[0])
        self.files = [safe_open(path, "pt") for path in paths]
        self.names = sorted({name for file in self.files for name in file.keys()})  # noqa: SIM118
        self._rows: dict[str, list[tuple[int, int]]] = {}
        for i, file in enumerate(self.files):
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                self._rows.setdefault(name, []).append((i, shape[0] if shape else 1))

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole tensor."""
        parts = self._rows[name]
        shape = self.files[parts[0][0]].get_slice(name).get_shape()
        return torch.Size([sum(n for _, n in parts), *shape[1:]] if shape else [])

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read a tensor, or only some of its rows."""
        if not self.shape(name):
            # Not a view of the file, which would keep it open for the lifetime of the tensor.
            return self.files[self._rows[name][0][0]].get_tensor(name).clone()
        rows = rows or slice(0, self.shape(name)[0])
        found, before = [], 0
        for i, n in self._rows[name]:
            start, stop = max(rows.start - before, 0), min(rows.stop - before, n)
            if start < stop or not n:
                found.append(self.files[i].get_slice(name)[start : max(start, stop)])
            before += n
        first = self.files[self._rows[name][0][0]]
        return torch.cat(found) if found else first.get_slice(name)[:0]

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """Read a tensor onto the device of ``tensor``, sharded like it."""
        if not isinstance(tensor, DTensor) or not self.shape(name):
            return self.read(name).to(tensor.device)
        return sharded_like(tensor, self.read(name, own_rows(tensor)).to(tensor.device))


@torch.no_grad()
def load_parts(task: nn.Module, parts: Parts) -> str:
    """Load all parts into a task; returns "n of n tensors" for the log.

    Raises:
        UserError: names or shapes differ; the first few are given.
    """
    own = task.state_dict()
    shapes = {name: parts.shape(name) for name in parts.names}
    loaded = check_names_and_shapes({k: v.shape for k, v in own.items()}, shapes, parts.where)
    for name, value in own.items():
        local(value).copy_(local(parts.like(name, value)))
    return loaded


def load_moments(task: nn.Module, optimizer: Optimizer, parts: Parts) -> None:
    """Load an optimizer's tensors, as :func:`moments` names them.

    Raises:
        UserError: they are of other parameters, or of other shapes.
    """
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    parameters = {n: p for n, p in task.named_parameters() if p in trained}
    labels = [label.partition("::") for label in parts.names]
    # A parameter that was frozen so far has no moments; unknown names belong to another task.
    strange = sorted({owner for owner, _, _ in labels} - parameters.keys())
    problem = f"{len(strange)} parameters do not match ({', '.join(strange[:3])})"
    check(not strange, f"{parts.where}: {problem}")
    muons = by_muon(optimizer)
    for owner, _, key in labels:
        other = (key == MUONS_MOMENT) != (parameters[owner] in muons)
        check(not other, f"{parts.where}: {owner} was trained by another --optim.name")
        same = parts.shape(f"{owner}::{key}") in (parameters[owner].shape, torch.Size())
        check(same, f"{parts.where}: the moments of {owner} are of another shape")
    for owner, _, key in labels:
        # Fused AdamW keeps its step counter on the parameter's device, as it does its moments.
        value = parts.like(f"{owner}::{key}", parameters[owner])
        optimizer.state[parameters[owner]][key] = value


def blank_copy(module: T) -> T:
    """Copy with parameters on the meta device (without memory); buffers are copied."""
    without = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()
    }
    return copy.deepcopy(module, without)


def put_together(blank: T, sharded: nn.Module, main: bool, device: torch.device) -> T:
    """Unshard: a copy of ``blank`` with the present weights of ``sharded``, on ``device``.

    ``blank`` is a :func:`blank_copy` of the same module, made before sharding. On the main process;
    elsewhere returns ``blank`` itself. All processes must call it.
    """
    state = {}
    for name, value in sharded.state_dict().items():
        full = whole(value)
        if main:
            state[name] = full.detach().to(device, copy=True)
    if not main:
        return blank
    # What is in no state dict (a frozen teacher) is not needed in what is put together.
    filled = {
        id(p): nn.Parameter(
            state[name] if name in state else torch.empty_like(p, device=device), p.requires_grad
        )
        for name, p in blank.named_parameters()
    }
    made = copy.deepcopy(blank, filled).to(device)
    made.load_state_dict(state, strict=True)
    return made
