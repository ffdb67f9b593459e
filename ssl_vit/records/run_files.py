"""Run files: tolerant readers, which return problems as lines instead of raising."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ssl_vit.common.errors import UserError
from ssl_vit.common.layers import flatten
from ssl_vit.records.status import STATUS_FILE
from ssl_vit.training.run_files import CONFIG_FILE, METRICS_FILE, complete, read_row
from ssl_vit.weights.own_files import (
    DETECTOR_FILE,
    ENCODER_FILE,
    MODEL_FILE,
    own_metadata,
)

# Detects a changed file: its size in bytes, and its modification time in nanoseconds.
Stamp = tuple[int, int]
# Exported weights: an encoder, or a network trained on one.
_EXPORTED = (ENCODER_FILE, MODEL_FILE, DETECTOR_FILE)
# Sub-folders of a run that contain no other runs.
_NO_RUNS = {"checkpoints", "tensorboard", "panels"}


def stamp(path: Path) -> Stamp | None:
    """Stamp that changes when the file does; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def read_run_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the options of a run as ``group.option``, and the problems of the file."""
    try:
        tree = yaml.safe_load(path.read_bytes())
    except OSError as error:
        return {}, [_absent(path, error)]
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}, [f"{path}: damaged, not YAML"]
    good = isinstance(tree, dict) and all(isinstance(key, str) for key in tree)
    return (flatten(tree), []) if good else ({}, [f"{path}: damaged, no groups of options in it"])


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int, list[str]]:
    """Read the rows of a metrics file, the number of unreadable lines, and problems of the file.

    An unterminated last line is not counted: it may just be being written.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        return [], 0, [_absent(path, error)]
    rows = [read_row(line) for line in lines]
    torn = sum(
        row is None and bool(line.strip()) for row, line in zip(rows[:-1], lines, strict=False)
    )
    return [row for row in rows if row is not None], torn, []


def read_exported(folder: Path) -> tuple[str, int | None, list[str]]:
    """Read the method and step of a run's exported weights, and their problems."""
    problems = []
    for path in (folder / name for name in _EXPORTED):
        if not path.is_file():
            continue
        try:
            metadata = own_metadata(path)
        except UserError as error:
            problems.append(" ".join(str(error).split()))
            continue
        made = {**_mapping(metadata.get("about")), **_mapping(metadata.get("info"))}
        method, step = made.get("method"), made.get("step")
        by = method if isinstance(method, str) else ""
        return by, step if type(step) is int else None, problems
    return "", None, problems


def newest_checkpoint(folder: Path) -> tuple[int | None, int | None]:
    """Step of a run's newest complete checkpoint, and its number of training images; None where
    there is none, or it is not recorded."""
    try:
        path = complete(folder / "checkpoints")[-1]
        state = json.loads((path / "state.json").read_bytes())
    except (OSError, IndexError):
        return None, None
    except (ValueError, RecursionError):
        state = None
    count = _mapping(_mapping(state).get("images")).get("count")
    return int(path.name.removeprefix("step-")), count if type(count) is int else None


def find_runs(folder: Path) -> list[Path]:
    """Find all runs at or below a folder, sorted by name, also nested ones and those of sweeps.

    A run is a folder with ``metrics.jsonl``, ``status.json``, or a ``config.yaml`` with a group
    ``run``. Each is found once, under its own name rather than that of a link to it. Unreadable
    folders are skipped.
    """
    return sorted(path for path in _folders(folder) if is_run(path))


def is_run(folder: Path) -> bool:
    """True if a folder is a run folder."""
    if any((folder / name).is_file() for name in (METRICS_FILE, STATUS_FILE)):
        return True
    path = folder / CONFIG_FILE
    return path.is_file() and any(k.startswith("run.") for k in read_run_config(path)[0])


def _folders(top: Path) -> Iterator[Path]:
    """Walk a folder and all below it, links last, each folder once."""
    seen: set[Path] = set()
    own, links = [top], list[Path]()
    while own or links:
        folder = own.pop() if own else links.pop()
        try:
            real = folder.resolve()
            if real in seen:
                continue
            seen.add(real)
            inner = [p for p in folder.iterdir() if p.name not in _NO_RUNS and p.is_dir()]
        except (OSError, RuntimeError):  # a link loop raises the latter
            continue
        yield folder
        for path in inner:
            (links if path.is_symlink() else own).append(path)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _absent(path: Path, error: OSError) -> str:
    missing = isinstance(error, FileNotFoundError)
    return f"{path}: {'not there' if missing else f'cannot be read: {error.strerror or error}'}"
