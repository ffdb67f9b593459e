"""Sweep: the same command once for every combination of option values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from ssl_vit.common.errors import UserError, check

# Output options of the commands; each run of a sweep needs its own output.
_OUTPUTS = ("--run.out", "--out")


def combinations(sweeps: Sequence[str]) -> list[dict[str, str]]:
    """Combinations of ``["optim.lr=1e-4,3e-4", "run.seed=0,1"]``: four, in the order given.

    The last option varies fastest.

    Raises:
        UserError: an item is not ``option=value,value``, or an option or value is given twice.
    """
    options: dict[str, list[str]] = {}
    for text in sweeps:
        name, equals, values = text.partition("=")
        name = name.replace("_", "-")
        known = [value.strip() for value in values.split(",")]
        good = re.fullmatch(r"[a-z][a-z0-9.-]*", name) and equals and all(known)
        check(bool(good), f"--sweep is {text!r}; write option=value,value as optim.lr=1e-4,3e-4")
        check(name not in options, f"--sweep has {name} twice; give its values together")
        check(len({*known}) == len(known), f"--sweep is {text!r}; a value is given twice")
        check(
            f"--{name}" not in _OUTPUTS, f"--sweep is {text!r}; each run has its own output anyway"
        )
        options[name] = known
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]


def swept(command: Sequence[str], sweeps: Sequence[str]) -> list[list[str]]:
    """Commands of a sweep: each with its values, and its own output inside the given one.

    An ``--out`` that is a file, as ``scores.json``, becomes ``scores-optim.lr=1e-4.json``.

    Raises:
        UserError: a malformed sweep, or no output option is given.
    """
    rest, option, out = _split_output(command)
    commands, labels = [], set()
    for values in combinations(sweeps):
        label = ",".join(f"{name}={value}" for name, value in values.items())
        label = re.sub(r"[^\w.,=+-]+", "_", label)
        check(label not in labels, f"--sweep: two of its runs would be named {label}")
        labels.add(label)
        own = out / label
        if option == "--out" and out.suffix:  # --run.out is always a folder
            own = out.with_name(f"{out.stem}-{label}{out.suffix}")
        flags = [part for name, value in values.items() for part in (f"--{name}", value)]
        commands.append([*rest, *flags, option, str(own)])
    return commands


def _split_output(command: Sequence[str]) -> tuple[list[str], str, Path]:
    """Command without its output option, the option, and the output path."""
    rest, found, words = [], ("", ""), iter(command)
    for word in words:
        name, equals, value = word.partition("=")
        if name in _OUTPUTS:
            found = (name, value if equals else next(words, ""))
        else:
            rest.append(word)
    if not found[1]:
        raise UserError("--sweep needs --run.out FOLDER (or --out) after --, for its runs")
    return rest, found[0], Path(found[1])
