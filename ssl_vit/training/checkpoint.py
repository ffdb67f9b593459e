"""Checkpoints: a folder each, complete or absent; tensors as safetensors, the rest JSON.

Every process writes its part of the state in a background thread. The folder is renamed to its
final name only when all parts are on disk.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_vit.common.distributed import gather_texts
from ssl_vit.common.errors import RunFailed, UserError, check
from ssl_vit.common.files import share_as_usual, sync, write_text_atomically
from ssl_vit.training.parallel import Parallel
from ssl_vit.training.run_files import CHECKPOINT, STATE_FILE, complete, is_whole
from ssl_vit.training.shards import Parts, load_moments, load_parts, moments, own_part

log = logging.getLogger("ssl_vit")
_TASK, _OPTIMIZER = "task", "optimizer"
_NAME = "step-{:08d}"


def clean(folder: Path) -> None:
    """Remove what interrupted saves left; warn of checkpoints incomplete for another reason."""
    for partial in folder.glob(f".{CHECKPOINT}.partial"):
        if _remove(partial):
            log.warning("%s is an incomplete checkpoint; removed", partial)
    for path in folder.glob(CHECKPOINT):
        if not is_whole(path):
            log.warning("%s lacks some of its files; it is ignored", path)


def _remove(folder: Path) -> bool:
    """Remove a folder that is no longer needed; a failure is logged and does not stop the run."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s cannot be removed: %s", folder, error)
        return False
    return True


@dataclass
class _Save:
    """Pending save: a checkpoint being written; ``work`` is this process' thread for it."""

    path: Path
    partial: Path
    state: dict[str, Any]
    work: threading.Thread = field(default_factory=threading.Thread)
    written: bool = False
    error: str = ""


class Checkpoints:
    """Checkpoints of a run: ``folder/step-00001000``.

    One at a time is written, by threads, while training continues; the next waits for it. All
    processes call the same methods at the same step.

    Args:
        keep: how many of the newest are kept.
        keep_every: those of every ``keep_every``-th step are kept permanently; 0: none.
        guard: called before anything is written; its error ends the run.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int,
        parallel: Parallel,
        guard: Callable[[], object] = lambda: None,
    ) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.parallel, self.guard = parallel, guard
        self.under_way: _Save | None = None

    def save(
        self,
        step: int,
        task: nn.Module,
        optimizer: Optimizer,
        images: dict[str, Any],
        export: Callable[[], object] | None = None,
        extra: dict[str, Tensor] | None = None,
    ) -> None:
        """Copy the state after ``step`` optimizer steps, and start writing it.

        Args:
            images: fingerprint of the training set; compared on resuming.
            export: writes the other files of this step; on the process that passes one.
            extra: the trainer's own scalars.

        Raises:
            RunFailed: the previous checkpoint could not be written.
        """
        self.finish()
        rank, world = self.parallel.rank, self.parallel.world
        path = self.folder / _NAME.format(step)
        state = {**moments(task, optimizer), **{f"::{k}": v for k, v in (extra or {}).items()}}
        count = {"step": step, "images": images, "moments": len(state), "world": world}
        buffers = {name for name, _ in task.named_buffers()}
        files = {
            _file(_TASK, rank, world): own_part(task.state_dict(), buffers, rank, world),
            _file(_OPTIMIZER, rank, world): own_part(state, set(), rank, world),
        }
        partial = path.with_name(f".{path.name}.partial")

        def write() -> None:
            self.guard()
            partial.mkdir(parents=True, exist_ok=True)
            for name, tensors in files.items():
                self.guard()
                save_file(tensors, partial / name)
                share_as_usual(partial / name)
                sync(partial / name)
            if export is not None:
                self.guard()
                export()

        self.under_way = _Save(path, partial, count)
        self._begin(self.under_way, write)

    def _begin(self, save: _Save, work: Callable[[], object]) -> None:
        def attempt() -> None:
            try:
                work()
            except Exception as error:  # of any kind: unreported, the save would count as done
                save.error = f"checkpoint {save.path} cannot be written: {error}"

        save.work = threading.Thread(target=attempt, daemon=True)
        save.work.start()

    def state(self) -> tuple[bool, bool]:
        """State of this process' part: writing it failed, it is still being written."""
        save = self.under_way
        if save is None:
            return False, False
        busy = save.work.is_alive()  # first: it may fail and end between the two
        return bool(save.error), busy

    def go_on(self, failed: bool, busy: bool) -> None:
        """Advance a save by one stage, given ``state`` reduced (by "any") over processes.

        Raises:
            RunFailed: it cannot be written; its files are removed, older checkpoints stay. Or that
                of ``guard``, also if nothing is being written.
        """
        self.guard()
        save = self.under_way
        if save is None or (busy and not failed):
            return
        if failed:
            self._give_up(save)
        elif save.written:
            self.under_way = None
        else:
            save.written = True
            if self.parallel.main:
                self._begin(save, lambda: self._name(save))

    def finish(self) -> None:
        """Wait until nothing is being written.

        Raises:
            RunFailed: as ``go_on``.
        """
        while self.under_way is not None:
            self.under_way.work.join()
            failed, busy = self.parallel.most(*self.state())
            self.go_on(bool(failed), bool(busy))

    def _give_up(self, save: _Save) -> None:
        save.work.join()
        errors = gather_texts(save.error)
        if self.parallel.main:
            shutil.rmtree(save.partial, ignore_errors=True)
        self.under_way = None
        raise RunFailed(self.parallel.first(errors), everywhere=True)

    def _name(self, save: _Save) -> None:
        """Complete a written checkpoint by renaming it, and drop the oldest; main process only."""
        self.guard()
        world = self.parallel.world
        names = [_file(kind, r, world) for kind in (_TASK, _OPTIMIZER) for r in range(world)]
        sizes = {}
        for name in names:
            sizes[name] = _size(save.partial / name)
        write_text_atomically(save.partial / STATE_FILE, json.dumps({**save.state, "files": sizes}))
        if save.path.exists():  # an incomplete one, which was ignored
            shutil.rmtree(save.path)
        save.partial.rename(save.path)
        sync(self.folder)
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        for old in complete(self.folder)[: -self.keep]:
            step = int(old.name.removeprefix("step-"))
            if not self.keep_every or step % self.keep_every:
                # Renamed first: a half-deleted folder must not look like a checkpoint.
                _remove(old.rename(old.with_name(f".{old.name}.partial")))


def _size(file: Path, patience: float = 10.0) -> int:
    """Size of a file written by another machine; network disks may show it late.

    Raises:
        OSError: it does not appear in time.
    """
    until = time.monotonic() + patience
    while not file.is_file():
        if time.monotonic() > until:
            raise OSError(f"{file} is not there; --run.out must be on a disk all nodes share")
        time.sleep(0.1)
    return file.stat().st_size


def _file(kind: str, rank: int, world: int) -> str:
    if world == 1:
        return f"{kind}.safetensors"
    return f"{kind}-{rank + 1:05d}-of-{world:05d}.safetensors"


def load_checkpoint(
    path: Path, task: nn.Module, optimizer: Optimizer, extra: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """Load a checkpoint into a task and its optimizer; returns its other state, with ``step``.

    It may have been written by another number of processes, sharded or not. ``extra``: the
    trainer's own scalars, set to the saved values where there are any.

    Raises:
        UserError: not a checkpoint, damaged, or of another architecture. Nothing is unpickled.
    """
    state = _read_state(path)
    world = state.get("world", 1)
    task_parts, moment_parts = (
        Parts([path / _file(kind, r, world) for r in range(world)]) for kind in (_TASK, _OPTIMIZER)
    )
    log.info("task: %s", load_parts(task, task_parts))
    count = len(moment_parts.names)
    check(
        state.get("moments") in (None, count),
        f"{moment_parts.where}: {count} tensors, and {state.get('moments')} were written",
    )
    for name, value in (extra or {}).items():
        if f"::{name}" in moment_parts.names:
            value.copy_(moment_parts.read(f"::{name}"))
    moment_parts.names = [name for name in moment_parts.names if not name.startswith("::")]
    load_moments(task, optimizer, moment_parts)
    return state


def read_images(path: Path) -> dict[str, Any]:
    """Description of the images in a checkpoint, which it was trained on; empty: none.

    Raises:
        UserError: it is not a checkpoint, or damaged.
    """
    found = _read_state(path).get("images")
    return found if isinstance(found, dict) else {}


def _read_state(path: Path) -> dict[str, Any]:
    kind = "a file, not a checkpoint folder" if path.is_file() else "not a checkpoint folder"
    check(
        (path / STATE_FILE).is_file(), f"{path} is {kind} (step-00001000, with {STATE_FILE} in it)"
    )
    try:
        state = json.loads((path / STATE_FILE).read_text())
        found = state | {"step": int(state["step"]), "world": int(state.get("world", 1))}
        check(found["step"] >= 0, f"step is {found['step']}")
        # At most the number of files: that many would be opened.
        most = len(list(path.glob(f"{_TASK}*.safetensors")))
        check(1 <= found["world"] <= most, f"world is {found['world']}, of {most} files")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path / STATE_FILE} is damaged: {error}") from None
    check(is_whole(path), f"{path} lacks some of its files, or of their bytes")
    return found
