"""Report command: ``python -m ssl_vit.report RUN [RUN ...] [--out FILE]``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import tyro

from ssl_vit.commands.cli import run_door
from ssl_vit.common.checks import check_file
from ssl_vit.common.errors import check
from ssl_vit.common.files import write_text_atomically
from ssl_vit.common.layers import COMMAND_LINE, parse
from ssl_vit.records.run_folder import find_runs

log = logging.getLogger("ssl_vit")
_PROG = "python -m ssl_vit.report"
_ABOUT = (
    "Report of a run in one self-contained HTML file: its course, its health, and the quality of "
    "its features. Several runs are compared side by side."
)


@dataclass(frozen=True)
class ReportConfig:
    """Report options: the runs, and the HTML file."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders. Several are compared at equal numbers of images seen."""
    out: str = ""
    """HTML file. Empty: report.html in the run folder, or, for several, in their parent folder."""
    seed: int = 0
    """Seed of the projections of images."""

    def __post_init__(self) -> None:
        check_file(self.out, "the report is one HTML file", ".html", ".htm")


def find_folders(given: tuple[str, ...]) -> list[Path]:
    """Run folders named on the command line.

    Raises:
        UserError: none is named, or one does not exist or is no run; a run inside it is named.
    """
    check(bool(given), f"no run is named; usage: {_PROG} RUN [RUN ...]")
    folders = [Path(name).expanduser() for name in given]
    check(len({f.resolve() for f in folders}) == len(folders), "RUN names the same run twice")
    for name, folder in zip(given, folders, strict=True):
        check(folder.is_dir(), f"RUN is {name!r}; there is no such folder")
        inside = find_runs(folder)
        hint = f"; it contains runs, such as {inside[0]}" if inside else ""
        check(folder in inside, f"RUN is {name!r}, which is no run{hint}")
    return folders


def names_of(folders: list[Path]) -> list[str]:
    """Display names of the runs: folder names, with as much of the path as makes them distinct."""
    whole = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            break
    return names


def default_file(folders: list[Path]) -> Path:
    """HTML file if ``--out`` is not given."""
    if len(folders) == 1:
        return folders[0] / "report.html"
    parents = {folder.resolve().parent for folder in folders}
    return (parents.pop() if len(parents) == 1 else Path()) / "report.html"


def main(argv: list[str]) -> int:
    """Report command; returns the exit status."""
    config = parse(ReportConfig(), argv, COMMAND_LINE, _PROG, _ABOUT)
    folders = find_folders(config.runs)
    out = Path(config.out).expanduser() if config.out else default_file(folders)
    # Imported late: errors and --help need no plotting libraries.
    from ssl_vit.reporting.page import render
    from ssl_vit.reporting.story import read_story

    stories = [read_story(f, name) for f, name in zip(folders, names_of(folders), strict=True)]
    # File names may contain bytes that are not valid UTF-8.
    page = render(stories, config.seed).encode("utf-8", "replace").decode()
    write_text_atomically(out, page)
    for problem in (problem for story in stories for problem in story.problems):
        log.warning("%s", problem)
    print(f"report of {', '.join(names_of(folders))}: {out} ({len(page) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run_door(main)
