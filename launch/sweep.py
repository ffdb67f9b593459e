"""A sweep: the same door once for every combination of the options' values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from ssl_vit.common.config import UserError, check

# Where a door writes; each of a sweep needs a place of its own.
_PLACES = ("--run.out", "--out")


def combinations(sweeps: Sequence[str]) -> list[dict[str, str]]:
    """``["optim.lr=1e-4,3e-4", "run.seed=0,1"]`` as its four combinations, in the order given.

    The last option varies fastest.

    Raises:
        UserError: what is no ``option=value,value``, and options or values given twice.
    """
    options: dict[str, list[str]] = {}
    for text in sweeps:
        name, equals, values = text.partition("=")
        name = name.replace("_", "-")
        known = [value.strip() for value in values.split(",")]
        good = re.fullmatch(r"[a-z][a-z0-9.-]*", name) and equals and all(known)
        check(bool(good), f"--sweep is {text!r}; write option=value,value as optim.lr=1e-4,3e-4")
        check(name not in options, f"--sweep has {name} twice; give its values together")
        check(len({*known}) == len(known), f"--sweep is {text!r}; a value is there twice")
        check(
            f"--{name}" not in _PLACES, f"--sweep is {text!r}; each has a place of its own anyway"
        )
        options[name] = known
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]


def swept(command: Sequence[str], sweeps: Sequence[str]) -> list[list[str]]:
    """The commands of a sweep: each with its values, and a place of its own inside that given.

    An ``--out`` that is a file, as ``scores.json``, becomes ``scores-optim.lr=1e-4.json``.

    Raises:
        UserError: a malformed sweep, or no place given.
    """
    rest, option, place = _split_place(command)
    commands, labels = [], set()
    for values in combinations(sweeps):
        label = ",".join(f"{name}={value}" for name, value in values.items())
        label = re.sub(r"[^\w.,=+-]+", "_", label)
        check(label not in labels, f"--sweep: two of its runs would be named {label}")
        labels.add(label)
        own = place / label
        if option == "--out" and place.suffix:  # a run's is a folder, whatever its name
            own = place.with_name(f"{place.stem}-{label}{place.suffix}")
        flags = [part for name, value in values.items() for part in (f"--{name}", value)]
        commands.append([*rest, *flags, option, str(own)])
    return commands


def _split_place(command: Sequence[str]) -> tuple[list[str], str, Path]:
    """A command without its place, the option that gives it, and the place."""
    rest, found, words = [], ("", ""), iter(command)
    for word in words:
        name, equals, value = word.partition("=")
        if name in _PLACES:
            found = (name, value if equals else next(words, ""))
        else:
            rest.append(word)
    if not found[1]:
        raise UserError("--sweep needs --run.out FOLDER (or --out) after --; each run is inside it")
    return rest, found[0], Path(found[1])
