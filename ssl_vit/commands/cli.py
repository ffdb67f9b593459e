"""What every door shares: errors in one line, recipes by name, tables, logging."""

from __future__ import annotations

import atexit
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

from ssl_vit.common.config import RunFailed, UserError, did_you_mean
from ssl_vit.common.distributed import rank_and_world
from ssl_vit.common.layers import known_keys, parse, yaml_flags
from ssl_vit.training.launched import Launched, launched
from ssl_vit.training.parallel import lost_process, stop_parallel

T = TypeVar("T")
# A scheduler's signal ended a run, which is saved: the same command goes on (EX_TEMPFAIL).
GO_ON = 75
_HERE = Path(__file__).parents[1]


def run_door(main: Callable[[list[str]], int]) -> None:
    """Run a door and leave with its status: 2 for a user's mistake, 1 for a run that failed
    (or files that cannot be written, or another process that is gone), 130 when interrupted.

    Each is one line on standard error, without a traceback.
    """
    # force: a library may have installed a handler of its own before.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    own = Launched()
    try:
        own = launched()
        # Libraries speak only of what went wrong.
        logging.getLogger("ssl_vit").setLevel(logging.ERROR if own.rank else logging.INFO)
        status = main(sys.argv[1:])
    except (UserError, RunFailed, OSError, SafetensorError) as error:
        status = 2 if isinstance(error, UserError) else 1
        _say(own, "error" if status == 2 else "stopped", error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception as error:
        status = 1
        if lost_process(error):
            _say(own, "stopped: another process is gone, or has not answered in time", error)
        else:
            traceback.print_exc()
    if status not in (0, GO_ON):
        # To part in good order would be to wait: for other processes, who may be waiting for this
        # one, and for a checkpoint that is being written, which will not count.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    stop_parallel()
    sys.exit(status)


def _say(own: Launched, kind: str, error: Exception) -> None:
    """One line on what went wrong; what all processes say alike, one says."""
    # Before they have met, all say the same if they are on one machine.
    met = rank_and_world()[1] > 1
    alike = getattr(error, "everywhere", False) or (not met and own.local_rank > 0)
    if own.rank and alike:
        return
    text = str(error).strip().split("\n")[0] if lost_process(error) else str(error)
    who = f"process {own.rank} ({platform.node()}): " if own.rank else ""
    print(f"{who}{kind}: {text}", file=sys.stderr)


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    for folder in (_HERE / "configs", _HERE.parent / "configs"):
        if folder.is_dir():
            return {p.stem: p for p in sorted(folder.glob("*.yaml"))}
    return {}


def find_recipe(name: str) -> Path:
    """A recipe by the name of its file in ``configs/``, or by path.

    Raises:
        UserError: neither; the nearest names are given.
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
    """The first argument, one of ``names``; ``--help`` alone lists them and leaves.

    Raises:
        UserError: none, or another; the nearest is given.
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
    """The values of ``--config`` among the arguments, and the other arguments."""
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
    """Defaults < YAML files, in turn < command line; a mistake names the layer it was made in."""
    known = known_keys(default)
    if {"-h", "--help"} & set(flags):
        parse(default, ["--help"], "", prog, about, kind)
    for file in files:
        default = parse(default, yaml_flags(file, known), str(file), prog, about, kind)
    return parse(default, flags, "command line", prog, about, kind)


def show_table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """A table on standard output, at most 100 columns wide."""
    table = Table(show_header=bool(header))
    for i, name in enumerate(header or rows[0]):
        table.add_column(
            name if header else "", justify="left" if i == 0 or not header else "right"
        )
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = min(100, console.width if console.is_terminal else 100)
    # Not the table's own title, which would be wrapped to the width of a narrow table.
    console.print(title, highlight=False)
    console.print(table)
