"""Checkpoints: a folder each, complete or absent; tensors as safetensors, the rest JSON."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_vit.config import RunFailed, UserError, check
from ssl_vit.files import write_folder_atomically
from ssl_vit.weights.exchange import contiguous_state, load_strictly, read_safetensors

log = logging.getLogger("ssl_vit")
_STATE, _TASK, _OPTIMIZER = "state.json", "task.safetensors", "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run: ``folder/step-00001000``, the newest ``keep`` of them."""

    folder: Path
    keep: int

    def save(
        self, step: int, task: nn.Module, optimizer: Optimizer, images: dict[str, Any]
    ) -> Path:
        """Write the state after ``step`` optimizer steps, then drop the oldest checkpoints.

        ``images`` tells the training set from a changed one; it is compared on resuming.

        Raises:
            RunFailed: the disk does not take it; nothing of it is left, older ones stay.
        """
        path = self.folder / f"step-{step:08d}"
        if path in self.complete():
            return path

        def write(folder: Path) -> None:
            save_file(contiguous_state(task), folder / _TASK)
            tensors = moments(task, optimizer)
            save_file(tensors, folder / _OPTIMIZER)
            state = {"step": step, "images": images, "moments": len(tensors)}
            (folder / _STATE).write_text(json.dumps(state))

        try:
            write_folder_atomically(path, write)
        except (OSError, SafetensorError) as error:
            raise RunFailed(f"checkpoint {path} cannot be written: {error}") from error
        for old in self.complete()[: -self.keep]:
            # Renamed first: half a deleted folder must not pass for a checkpoint.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))
        return path

    def complete(self) -> list[Path]:
        """Whole checkpoints, the oldest first. What a killed save left has another name."""
        return sorted(p for p in self.folder.glob("step-*") if (p / _STATE).is_file())

    def clean(self) -> None:
        """Remove what killed saves left behind, saying so."""
        for partial in self.folder.glob(".step-*.partial"):
            log.warning("%s is an incomplete checkpoint; removed", partial)
            shutil.rmtree(partial)


def load_checkpoint(path: Path, task: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load a checkpoint into a task and its optimizer; the rest of it, with its ``step``.

    Raises:
        UserError: not a checkpoint, damaged, or of another architecture. Nothing is unpickled.
    """
    state = _read_state(path)
    log.info("task: %s", load_strictly(task, read_safetensors(path / _TASK)[0], str(path / _TASK)))
    _load_moments(task, optimizer, path / _OPTIMIZER, state.get("moments"))
    return state


def _read_state(path: Path) -> dict[str, Any]:
    kind = "a file, not a checkpoint folder" if path.is_file() else "not a checkpoint folder"
    check((path / _STATE).is_file(), f"{path} is {kind} (step-00001000, with {_STATE} in it)")
    try:
        state = json.loads((path / _STATE).read_text())
        return state | {"step": int(state["step"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / _STATE} is damaged: {error}") from None


def moments(task: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, named ``parameter::tensor``."""
    names: dict[Tensor, str] = {p: n for n, p in task.named_parameters()}
    return {
        f"{names[p]}::{key}": value.detach().to("cpu", copy=True).contiguous()
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def _load_moments(task: nn.Module, optimizer: Optimizer, path: Path, count: int | None) -> None:
    tensors = read_safetensors(path)[0]
    check(
        count is None or len(tensors) == count,
        f"{path}: {len(tensors)} tensors, and {count} were written",
    )
    parameters = {n: p for n, p in task.named_parameters() if p.requires_grad}
    saved: dict[str, dict[str, Tensor]] = {}
    for label, value in tensors.items():
        owner, _, key = label.partition("::")
        saved.setdefault(owner, {})[key] = value
    # A parameter that was frozen so far has no moments; another set of names is another task's.
    strange = sorted(saved.keys() - parameters.keys())
    check(not strange, f"{path}: {len(strange)} parameters do not match ({', '.join(strange[:3])})")
    for name, state in saved.items():
        same = all(v.shape in (parameters[name].shape, ()) for v in state.values())
        check(same, f"{path}: the moments of {name} are of another shape")
    for name, state in saved.items():
        parameter = parameters[name]
        # Fused AdamW keeps its step counter beside the parameter, as it does its moments.
        optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}
