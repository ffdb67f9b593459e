"""Command line of all doors: one-line errors, exit status, recipes by name, tables, logging.

Nothing here imports torch, which takes longer than all else that a mistake or ``--help`` needs.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from ssl_vit.common.errors import RunFailed, UserError, did_you_mean
from ssl_vit.common.layers import known_keys, parse, yaml_flags
from ssl_vit.common.presets import NATURAL, preset_of, with_preset
from ssl_vit.training.launched import Launched, launched

T = TypeVar("T")
# Exit status of a run that a scheduler's signal stopped and that is saved: the same command resumes
# it (EX_TEMPFAIL).
RESUMABLE = 75
_HERE = Path(__file__).parents[1]


def run_door(main: Callable[[list[str]], int]) -> None:
    """Door: run ``main`` on the command line and exit with its status.

    Errors are one line on standard error, without a traceback, and a status: 2 for a user's
    mistake, 1 for a run that failed (or files that cannot be written, a lost process, a
    lack of memory), 130 when
    interrupted.
    """
    # force: a library may have installed a handler of its own before.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    own = Launched()
    try:
        own = launched()
        # Other libraries log warnings and errors only.
        logging.getLogger("ssl_vit").setLevel(logging.ERROR if own.rank else logging.INFO)
        status = main(sys.argv[1:])
    except (UserError, RunFailed, OSError, SafetensorError) as error:
        status = 2 if isinstance(error, UserError) else 1
        _print_error(own, "error" if status == 2 else "stopped", error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception as error:
        status = 1
        from ssl_vit.training.failures import failure_line

        if line := failure_line(error):
            _print_error(own, "stopped", RunFailed(line))
        else:
            traceback.print_exc()
    if status not in (0, RESUMABLE):
        # A regular exit would wait for other processes, which may be waiting for this one, and for
        # a checkpoint being written, which will not be complete.
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):  # nobody may be there to read it
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    if _processes() > 1:
        from ssl_vit.training.parallel import stop_parallel

        stop_parallel()
    sys.exit(status)


def _processes() -> int:
    """Processes of the group that this one has joined; 1 where torch, which has it, is not used."""
    if "torch" not in sys.modules:
        return 1
    from ssl_vit.common.distributed import rank_and_world

    return rank_and_world()[1]


def _print_error(own: Launched, kind: str, error: Exception) -> None:
    """Print an error in one line; of an error that all processes raise, one process prints it."""
    # Before the process group exists, all processes on one machine raise the same error.
    alone = _processes() == 1
    same = getattr(error, "everywhere", False) or (alone and own.local_rank > 0)
    if own.rank and same:
        return
    who = f"process {own.rank} ({platform.node()}): " if own.rank else ""
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(f"{who}{kind}: {error}", file=sys.stderr)


def recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    for folder in (_HERE / "configs", _HERE.parent / "configs"):
        if folder.is_dir():
            return {p.stem: p for p in sorted(folder.glob("*.yaml"))}
    return {}


def find_recipe(name: str) -> Path:
    """Recipe by the name of its file in ``configs/``, or by path.

    Raises:
        UserError: there is none; the error gives the nearest names.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = recipes()
    if name not in known:
        hint = did_you_mean(name, known) or f" (recipes: {', '.join(known)})"
        raise UserError(f"--config is {name!r}; no such file, and no recipe of that name{hint}")
    return known[name]


def subcommand(argv: Sequence[str], prog: str, what: str, names: Sequence[str]) -> str:
    """Subcommand: the first argument, one of ``names``; ``--help`` alone lists them and exits.

    Raises:
        UserError: it is missing or unknown; the error gives the nearest names.
    """
    usage = f"usage: {prog} {what.upper()} [options]; {what.upper()} is one of {', '.join(names)}"
    if argv and argv[0] in ("-h", "--help"):
        print(f"{usage}\n{prog} {names[0]} --help lists the options")
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise UserError(usage)
    if argv[0] not in names:
        allowed = f"it must be one of {', '.join(names)}{did_you_mean(argv[0], names)}"
        raise UserError(f"{what} is {argv[0]!r}; {allowed}")
    return argv[0]


def split_config(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Values of ``--config`` among the arguments, and the other arguments."""
    configs, rest, it = [], [], iter(argv)
    for argument in it:
        if argument.startswith("--config="):
            configs.append(argument.removeprefix("--config="))
        elif argument == "--config":
            value = next(it, None)
            if value is None:
                raise UserError("--config needs a YAML file or the name of a recipe")
            configs.append(value)
        else:
            rest.append(argument)
    return configs, rest


def layered(
    default: T, files: Sequence[Path], flags: Sequence[str], prog: str, about: str, kind: object
) -> T:
    """Layered options: defaults < ``data.preset``, where there is one < YAML files, in turn <
    command line; errors name the layer."""
    known = known_keys(default)
    if {"-h", "--help"} & set(flags):
        parse(default, ["--help"], "", prog, about, kind)

    def read(config: T) -> T:
        for file in files:
            config = parse(config, yaml_flags(file, known), str(file), prog, about, kind)
        return parse(config, flags, "command line", prog, about, kind)

    config = read(default)
    return config if preset_of(config) == NATURAL else read(with_preset(default, config))


def show_table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print a table on standard output, at most 100 columns wide."""
    table = Table(show_header=bool(header))
    for i, name in enumerate(header or rows[0]):
        table.add_column(
            name if header else "", justify="left" if i == 0 or not header else "right"
        )
    for row in rows:
        table.add_row(*row)
    # Names of files and sources are no markup: digits:train: 3, scans[1].
    console = Console(markup=False, emoji=False)
    console.width = min(100, console.width if console.is_terminal else 100)
    # Printed separately: the table's own title would be wrapped to the width of a narrow table.
    console.print(title, highlight=False)
    console.print(table)
