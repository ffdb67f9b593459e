"""Resuming: a run starts anew, from its newest checkpoint, or from another run's."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ssl_vit.common.config import RunConfig
from ssl_vit.common.errors import UserError, check
from ssl_vit.common.layers import as_written, written
from ssl_vit.training.checkpoint import load_checkpoint, read_images
from ssl_vit.training.loop import Trainer
from ssl_vit.training.run_files import CONFIG_FILE, complete

log = logging.getLogger("ssl_vit")

# Options that may change when a run is resumed: they do not affect its numbers, except by rounding
# (and except how fine-tuning mixes images, which is within the parts of a batch).
_FREE = {
    "data.cache",
    "data.cache_reserve",
    "data.max_bad",
    "data.shard_cache",
    "data.shard_cache_size",
    "data.workers",
    "optim.accumulate",
    "run.activation_checkpointing",
    "run.device",
    "run.keep",
    "run.keep_every",
    "run.log_every",
    "run.max_nonfinite",
    "run.out",
    "run.parallel",
    "run.probe_every",
    "run.probe_images",
    "run.resume",
    "run.save_every",
    "run.timeout",
}


def starting_point(run: RunConfig, out: Path) -> Path | None:
    """Checkpoint to resume from, or None to start anew.

    Raises:
        UserError: ``run.resume`` is a path without a checkpoint.
    """
    if run.resume == "never":
        return None
    own = complete(out / "checkpoints")
    if own:
        return own[-1]
    if run.resume == "auto":
        return None
    path = Path(run.resume).expanduser()
    check(
        path.exists(),
        f"--run.resume is {run.resume!r}; allowed: auto, never, or a checkpoint folder that exists",
    )
    return path


def check_same(config: Any, out: Path, start: Path, now: dict[str, Any]) -> None:
    """Check that a run that goes on from a checkpoint of its own has its options and its images.

    Args:
        out: the run folder. The checkpoint ``start`` may be another run's.
        now: ``Session.fingerprint``.

    Raises:
        UserError: it has others.
    """
    if start.parent != out / "checkpoints":
        return
    before = read_images(start)
    check_same_run(config, out, files_alike(now, before))
    check_same_images(now, before, start)


def check_same_run(config: Any, out: Path, alike: Mapping[str, bool] | None = None) -> None:
    """Check that no option that affects a run's numbers has changed since it was started.

    Args:
        alike: options whose values name files: whether these are the same as then, wherever they
            are now. Where that is not known, the values are compared.

    Raises:
        UserError: an option differs from the run folder's ``config.yaml``.
    """
    path, alike = out / CONFIG_FILE, alike or {}
    if not path.is_file():
        return
    try:
        before = written(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, AttributeError):
        raise UserError(f"{path} is damaged; give another --run.out") from None
    now = as_written(config)
    # If only one is set, the held-out split differs.
    if "data.val" not in alike and before.get("data.val") and now["data.val"]:
        before["data.val"] = now["data.val"]
    before = _defaults(config) | before
    for key in sorted(now.keys() - _FREE):
        if before.get(key) == now[key]:
            continue
        flag = f"--{key.replace('_', '-')}"
        if alike.get(key):
            log.info("%s is %r, and was %r: the same by content", flag, now[key], before.get(key))
            continue
        others = ", with other content" if key in alike else ""
        raise UserError(
            f"{flag} is {now[key]!r}, but the run in {out} was started with {before.get(key)!r}"
            f"{others}; give another --run.out, or --run.resume never to start anew"
        )


def files_alike(now: dict[str, Any], before: dict[str, Any]) -> dict[str, bool]:
    """Options whose files are known then and now (``Session.fingerprint``), and whether these are
    the same."""
    return {
        option: digest == before[group][option]
        for group in ("content", "weights")
        for option, digest in now.get(group, {}).items()
        if option in before.get(group, {})
    }


def check_same_images(now: dict[str, Any], before: dict[str, Any], path: Path) -> None:
    """Check that the images are those that a checkpoint was trained on, as far as it says.

    Args:
        now, before: ``Session.fingerprint`` now, and as saved.

    Raises:
        UserError: they have changed.
    """
    changes = [
        f"{before[key]} then, {now[key]} now ({key})"
        for key in ("count", "mean", "std")
        if key in before and before[key] != now[key]
    ]
    alike = files_alike(now, before)
    others = [option for option in now["content"] if not alike.get(option, True)]
    changes += [f"--{option} has others, by name, size or content" for option in others]
    if "labels" in before and before["labels"] != now.get("labels"):
        changes.append("other labels")
    check(
        not changes,
        f"the images have changed since {path} was written: {'; '.join(changes)}; "
        "give another --run.out, and --run.resume with this checkpoint to start from it",
    )


def _defaults(config: Any) -> dict[str, Any]:
    """Defaults of all groups: the values of options that are newer than the run's config file."""
    kinds: dict[str, Any] = {
        f.name: type(getattr(config, f.name)) for f in dataclasses.fields(config)
    }
    plain = {name: kind() for name, kind in kinds.items() if hasattr(kind, "__dataclass_fields__")}
    return as_written(dataclasses.replace(config, **plain))


def move_aside(out: Path) -> Path:
    """Rename the folder of an existing run, so that a new one can use its name; its new path.

    Raises:
        UserError: the folder holds files, but no run.
    """
    check(
        (out / CONFIG_FILE).is_file(),
        f"--run.resume is 'never' and --run.out is {str(out)!r}, which holds files but no run",
    )
    number = 1
    while (other := out.with_name(f"{out.name}-before-{number}")).exists():
        number += 1
    out.rename(other)
    log.warning("%s holds a run; moved to %s", out, other)
    return other


def load_into(trainer: Trainer, path: Path) -> None:
    """Load a checkpoint into a trainer, its step number included.

    Raises:
        UserError: it is none, damaged, or of another architecture.
    """
    state = load_checkpoint(path, trainer.task, trainer.optimizer, trainer.guard.state)
    trainer.step = int(state["step"])
    log.info("resuming from %s: step %d of %d", path, trainer.step, trainer.schedule.total)
