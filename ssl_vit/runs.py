"""Run overview command: ``python -m ssl_vit.runs FOLDER [FOLDER ...] [--live] [--json]``."""

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
from ssl_vit.common.checks import check_positive
from ssl_vit.common.duration import duration
from ssl_vit.common.errors import check
from ssl_vit.common.layers import COMMAND_LINE, parse
from ssl_vit.records.run_folder import Run, find_runs, read_run

_PROG = "python -m ssl_vit.runs"
_ABOUT = "Overview of runs: progress, scores, state, and the commands that resume them."
# Seconds between updates at most, a day: sleep refuses numbers that are too large.
_LONGEST = 86400.0
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
    """Overview options: the runs, and the output format."""

    folders: Folders = ()
    """Run folders, or folders that contain runs at any depth."""
    live: bool = False
    """Update the table whenever something has changed, until Ctrl-C."""
    every: float = 2.0
    """Seconds between updates, with --live."""
    json: bool = False
    """Print one JSON object per run, one a line, for programs."""

    def __post_init__(self) -> None:
        check_positive(self, "every")
        check(not (self.live and self.json), "--live and --json exclude each other; give one")


@dataclass(frozen=True)
class Row:
    """Row of the overview: a run with its display name."""

    name: str
    run: Run

    def cells(self) -> list[str]:
        """Cells of the row, of one or two lines."""
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
        """Notes below the table: why the run does not run, how to resume it, what is wrong."""
        run = self.run
        lines = [f"{run.state}: {run.said}"] if run.said else []
        many = run.status.processes if run.status else 1
        how = f"resume (it ran in {many} processes)" if many > 1 else "resume"
        lines += [f"{how}: {run.resume}"] if run.resume else []
        if run.state in ("running", "silent", "failed"):
            lines += [f"warning: {line}" for line in run.warnings]
        return lines + [f"problem: {line}" for line in run.problems]

    def record(self) -> dict[str, Any]:
        """JSON record of the run, for programs."""
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
            "val_map": run.latest("val_map"),
            **{name: getattr(run, name) for name in later},
            "status": asdict(run.status) if run.status else None,
        }


def encoder(config: Mapping[str, Any]) -> tuple[str, str, str]:
    """Encoder of a run's options: architecture in short, image size and patch size; of fine-tuning:
    the encoder that was given, and two empty strings."""
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
    """Score cell: k-NN score in percent; of fine-tuning, the classifier's top-1 accuracy or, of
    several labels an image, mean average precision."""
    if run.knn:
        return f"{run.knn[1]:.1f}"
    for name, shown in (("val_top1", "top-1"), ("val_map", "mAP")):
        if (found := run.latest(name)) is not None:
            return f"{found:.1f}\n{shown}"
    return ""


def scan_runs(folders: Iterable[str], known: Mapping[Path, Run]) -> list[Row]:
    """Runs at and below folders, the newest first, each once; ``known``: those of the last scan by
    their folders, so that unchanged metrics are not read again."""
    tops = [Path(folder).expanduser() for folder in folders]
    found: dict[Path, Row] = {}
    for top in tops:
        for folder in find_runs(top):
            if folder.resolve() not in found:
                inner = folder.relative_to(top)
                name = str(inner if len(tops) == 1 and inner.parts else folder)
                found[folder.resolve()] = Row(name, read_run(folder, known.get(folder)))
    return sorted(found.values(), key=lambda row: row.run.updated, reverse=True)


def table(rows: list[Row]) -> Table:
    """Table of the runs; cells of two lines keep it within 80 columns."""
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("run", "method", "encoder"):
        drawn.add_column(name, overflow="fold", min_width=6)
    for name in ("step", "loss", "k-NN", "img/s\nleft"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("state", no_wrap=True)
    for row in rows:
        *cells, state = row.cells()
        drawn.add_row(*map(Text, cells), Text(state, style=_COLOURS[state]))
    return drawn


def heading(rows: list[Row]) -> str:
    """Heading: the number of runs, in all and in each state."""
    states = Counter(row.run.state for row in rows)
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    return f"{len(rows)} run{'s' * (len(rows) != 1)}: {counts}"


def notes(rows: list[Row]) -> list[Text]:
    """Notes below the table, each run's under its name."""
    lines = []
    for row in rows:
        if own := row.notes():
            lines += [Text(row.name, style="bold")]
            lines += [Text(f"  {line}", overflow="fold") for line in own]
    return lines


def show(console: Console, rows: list[Row]) -> None:
    """Print the table and the notes; a command stays on one line, to be copied."""
    console.print(heading(rows), highlight=False)
    console.print(table(rows))
    for line in notes(rows):
        console.print(line, soft_wrap=True)


def follow(console: Console, config: RunsConfig, rows: list[Row]) -> None:
    """Live view: update the table whenever something has changed, until Ctrl-C."""
    drawn = None
    try:
        # Transient: the live view is cut to the terminal; the whole table is printed at the end.
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                now = ([(row.cells(), row.notes()) for row in rows], console.size)
                if now != drawn:
                    drawn = now
                    frame = Group(Text(heading(rows)), table(rows), *notes(rows))
                    live.update(frame, refresh=True)
                time.sleep(min(config.every, _LONGEST))
                rows = scan_runs(config.folders, {row.run.folder: row.run for row in rows})
    except KeyboardInterrupt:
        show(console, rows)


def parse_options(argv: list[str]) -> RunsConfig:
    """Options of the command line.

    Raises:
        UserError: a mistake in them, or a folder that does not exist.
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
        check(path.is_dir(), f"FOLDER is {folder!r}, {what}; give a folder that contains runs")
    return config


def main(argv: list[str]) -> int:
    """Run overview command; returns the exit status."""
    config = parse_options(argv)
    rows = scan_runs(config.folders, {})
    check(bool(rows), f"no run in {' '.join(map(repr, config.folders))}, nor in a folder below")
    if config.json:
        for row in rows:
            print(json.dumps(row.record()))
        return 0
    console = Console(markup=False, emoji=False)
    if config.live:
        check(console.is_terminal, "--live needs a terminal; standard output is none")
        follow(console, config, rows)
    else:
        show(console, rows)
    return 0


if __name__ == "__main__":
    run_door(main)
