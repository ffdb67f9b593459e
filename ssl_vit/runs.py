"""Runs at a glance: ``python -m ssl_vit.runs FOLDER [FOLDER ...] [--live] [--json]``."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ssl_vit.commands.cli import run_door
from ssl_vit.common.config import check
from ssl_vit.common.layers import COMMAND_LINE, parse
from ssl_vit.records.run_folder import Run, find_runs, read_run
from ssl_vit.training.metrics import duration

_PROG = "python -m ssl_vit.runs"
_ABOUT = "How far runs are, what they score, and how to go on with them."
_COLOURS = {
    "running": "cyan",
    "finished": "green",
    "stopped": "yellow",
    "failed": "red",
    "killed": "red",
    "silent": "magenta",
    "unknown": "yellow",
}
Folders = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER ...")]


@dataclass(frozen=True)
class RunsConfig:
    """Which runs, and how they are shown."""

    folders: Folders = ()
    """Folders that hold runs, at any depth, or are one."""
    live: bool = False
    """Draw the table again whenever something has changed, until Ctrl-C."""
    every: float = 2.0
    """Seconds between two looks at the runs, with --live."""
    json: bool = False
    """For programs: one JSON object a run, each on a line."""

    def __post_init__(self) -> None:
        check(0 < self.every < 1e6, f"--every is {self.every:g}; seconds, above 0")
        check(not (self.live and self.json), "--live draws a table, and --json none; give one")


@dataclass(frozen=True)
class Shown:
    """A run as the table has it: its name, and its cells of one or two lines."""

    name: str
    run: Run

    def cells(self) -> list[str]:
        """The cells of its row; a second line for what is read less often."""
        run = self.run
        arch, size, patch = encoder(run.config)
        step = f"{run.step:,}" if run.total is None else f"{run.step:,}/{run.total:,}"
        part = "" if not run.total else f"\n{100 * run.step / run.total:.0f}%"
        rate = _number(run.images_per_second, ",.0f")
        left = "" if run.seconds_left is None else f"\n{duration(run.seconds_left)}"
        return [
            self.name,
            run.method or "?",
            f"{arch}\n{size} px, {patch}" if size else arch,
            step + part,
            _number(run.latest("loss"), ".4g"),
            score(run),
            rate + left,
            run.state,
        ]

    def notes(self) -> list[str]:
        """What is said below the table: why it does not run, how to go on, what is wrong."""
        run = self.run
        said = [f"{run.state}: {run.said}"] if run.said else []
        many = run.status.processes if run.status else 1
        how = f"go on (it ran in {many} processes)" if many > 1 else "go on"
        said += [f"{how}: {run.resume}"] if run.resume else []
        if run.state in ("running", "silent", "failed"):
            said += [f"warning: {line}" for line in run.warnings]
        return said + [f"problem: {line}" for line in run.problems]

    def record(self) -> dict[str, Any]:
        """The same for programs."""
        run = self.run
        arch, size, patch = encoder(run.config)
        names = ("method", "state", "said", "step", "total", "images_per_step", "steps_per_epoch")
        later = ("images_per_second", "seconds_left", "updated", "resume", "warnings", "problems")
        return {
            "folder": str(run.folder),
            **{name: getattr(run, name) for name in names},
            "encoder": {"arch": arch, "size": size, "patch": patch},
            "loss": run.latest("loss"),
            "knn": dict([run.knn]) if run.knn else {},
            "val_top1": run.latest("val_top1"),
            **{name: getattr(run, name) for name in later},
            "status": asdict(run.status) if run.status else None,
        }


def encoder(config: Mapping[str, Any]) -> tuple[str, str, str]:
    """Of a run's options: the architecture in short, the size of images and of patches; for
    fine-tuning, the encoder that was given, and nothing more."""
    arch = str(config.get("encoder.arch", config.get("encoder", "?")))
    if "encoder.arch" not in config:
        return arch, "", ""
    named = re.fullmatch(r"(.+?)_patch(\d+)_(\d+).*", arch)
    sides = config.get("encoder.image_size") or (named[3] if named else "")
    size = "x".join(str(side) for side in (sides if isinstance(sides, list | tuple) else [sides]))
    patch = str(config.get("encoder.patch_size") or (named[2] if named else "?"))
    return named[1] if named else arch, size or "?", patch


def _number(value: float | None, kind: str) -> str:
    return "" if value is None else format(value, kind)


def score(run: Run) -> str:
    """k-NN accuracy in percent; of fine-tuning, that of the classifier."""
    if run.knn:
        return f"{run.knn[1]:.1f}"
    top1 = run.latest("val_top1")
    return "" if top1 is None else f"{top1:.1f}\ntop-1"


def look(folders: Iterable[str], known: Mapping[Path, Run]) -> list[Shown]:
    """The runs at and below folders, the newest first, each once.

    ``known``: as they were, by their folders; metrics that have not changed are not read again."""
    tops = [Path(folder).expanduser() for folder in folders]
    found: dict[Path, Shown] = {}
    for top in tops:
        for folder in find_runs(top):
            if folder.resolve() not in found:
                inner = folder.relative_to(top)
                name = str(inner if len(tops) == 1 and inner.parts else folder)
                found[folder.resolve()] = Shown(name, read_run(folder, known.get(folder)))
    return sorted(found.values(), key=lambda shown: shown.run.updated, reverse=True)


def table(runs: list[Shown]) -> Table:
    """The runs, a row each; two lines of a cell keep it within 80 columns."""
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("run", "method", "encoder"):
        drawn.add_column(name, overflow="fold", min_width=6)
    for name in ("step", "loss", "k-NN", "img/s\nleft"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("state", no_wrap=True)
    for shown in runs:
        *cells, state = shown.cells()
        drawn.add_row(*map(Text, cells), Text(state, style=_COLOURS[state]))
    return drawn


def heading(runs: list[Shown]) -> str:
    """How many runs, and how they are."""
    states = Counter(shown.run.state for shown in runs)
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    return f"{len(runs)} run{'s' * (len(runs) != 1)}: {counts}"


def notes(runs: list[Shown]) -> list[Text]:
    """What is said below the table, the run's name before its lines."""
    lines = []
    for shown in runs:
        if said := shown.notes():
            lines += [Text(shown.name, style="bold")]
            lines += [Text(f"  {line}", overflow="fold") for line in said]
    return lines


def show(console: Console, runs: list[Shown]) -> None:
    """The table, and what is to be said of its runs; a command stays in one line, to be copied."""
    console.print(heading(runs), highlight=False)
    console.print(table(runs))
    for line in notes(runs):
        console.print(line, soft_wrap=True)


def follow(console: Console, config: RunsConfig, runs: list[Shown]) -> None:
    """Draw the table whenever something has changed, until Ctrl-C."""
    drawn = None
    try:
        # Transient: what is left in the end is the whole table, of which this is what fits.
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                now = ([(s.cells(), s.notes()) for s in runs], console.size)
                if now != drawn:
                    drawn = now
                    frame = Group(Text(heading(runs)), table(runs), *notes(runs))
                    live.update(frame, refresh=True)
                time.sleep(config.every)
                runs = look(config.folders, {s.run.folder: s.run for s in runs})
    except KeyboardInterrupt:
        show(console, runs)


def read_config(argv: list[str]) -> RunsConfig:
    """The options.

    Raises:
        UserError: a mistake in them, or a folder that is not there.
    """
    flags: list[str] = []
    for flag, after in zip_longest(argv, argv[1:]):  # a folder may follow --live
        flags.append(flag)
        flags += ["True"] if flag in ("--live", "--json") and after not in ("True", "False") else []
    config = parse(RunsConfig(), flags, COMMAND_LINE, _PROG, _ABOUT)
    check(bool(config.folders), f"usage: {_PROG} FOLDER [FOLDER ...] [--live] [--json]")
    for folder in config.folders:
        path = Path(folder).expanduser()
        what = "a file" if path.is_file() else "no such folder"
        check(path.is_dir(), f"FOLDER is {folder!r}; {what}, give one that holds runs")
    return config


def main(argv: list[str]) -> int:
    """The door; returns the exit status."""
    config = read_config(argv)
    runs = look(config.folders, {})
    check(bool(runs), f"no run in {' '.join(map(repr, config.folders))}, nor in a folder below")
    if config.json:
        for shown in runs:
            print(json.dumps(shown.record()))
        return 0
    console = Console()
    if config.live:
        check(console.is_terminal, "--live draws on a terminal; standard output is none")
        follow(console, config, runs)
    else:
        show(console, runs)
    return 0


if __name__ == "__main__":
    run_door(main)
