"""Options of the benchmark of quality per minute: what is compared, and on which images.

Options are read before torch is imported, which building a network takes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ssl_vit.commands.cli import layered, recipes
from ssl_vit.commands.eval_options import EvalData
from ssl_vit.commands.pretrain_options import PretrainConfig, default_options
from ssl_vit.common.checks import check_least, check_positive
from ssl_vit.common.errors import UserError, check, did_you_mean
from ssl_vit.common.layers import COMMAND_LINE, parse
from ssl_vit.common.reading import ReadConfig
from ssl_vit.methods import find_options, method_names, method_of

log = logging.getLogger("ssl_vit")
_PROG = "python -m ssl_vit.benchmark quality"


@dataclass(frozen=True)
class QualityConfig:
    """Quality per minute: each method is trained for the same time on this machine, with the length
    of its run fitted to its measured speed, and its encoder judged by k-NN and linear probe. All
    options of pretraining (--data.train, --encoder.image-size ...) are passed on to every run, over
    its recipe. The same command goes on with what is not done yet."""

    minutes: float = 35.0
    """Minutes of training for each run. Start-up, saving, probes and judging are not counted."""
    methods: str = ""
    """Methods, recipes of configs/ by name, or YAML files named METHOD_ANYTHING.yaml, separated by
    commas. A method stands for its recipes whose name ends in a word of --data.train. Empty: all
    such recipes that need no other files."""
    seeds: int = 1
    """Runs of each, with seeds from --run.seed on."""
    looks: int = 8
    """Points of the curve of online k-NN while training."""
    split: Literal["test", "search"] = "test"
    """test: train on --data.train, score on --data.val. search: for choosing methods and options;
    train on four fifths of --data.train and score on the other fifth."""
    against: str = "none"
    """Other implementations that train each recipe of a method that they have for the same time,
    from the same first encoder, with their own step and loader; separated by commas: original,
    lightly. A name that no method has is refused with those it has."""
    out: str = "quality"
    """Folder for the table (quality.md), the report (quality.json), the figure (quality.png) and
    the runs."""

    def __post_init__(self) -> None:
        check_positive(self, "minutes")
        check_least(self, 1, "seeds", "looks")


class Entry(NamedTuple):
    """Recipe of the comparison: its name, method and file, and the options of its runs."""

    name: str
    method: str
    file: Path
    options: PretrainConfig[Any]


@dataclass(frozen=True)
class Plan:
    """Plan of the benchmark: its own options, options passed on to each run, and the recipes."""

    config: QualityConfig
    flags: list[str]
    entries: list[Entry]

    @property
    def out(self) -> Path:
        """Folder of the results."""
        return Path(self.config.out).expanduser()

    def our_run(self, recipe: str, seed: int) -> Path:
        """Folder of our run of a recipe."""
        return self.out / "runs" / f"{recipe}-seed{seed}"

    @property
    def data(self) -> EvalData:
        """Images of the judging."""
        data = self.entries[0].options.data
        reading = {f.name: getattr(data, f.name) for f in fields(ReadConfig)}
        return EvalData(**reading, train=data.train, val=data.val, workers=data.workers)

    def asked(self) -> dict[str, Any]:
        """Options that all results of a folder have in common."""
        images = {"train": self.data.train, "val": self.data.val}
        return {"minutes": self.config.minutes, **images, "options": self.flags}


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of this command, and those of pretraining, whose names have a dot."""
    own: list[str] = []
    passed: list[str] = []
    place = own
    for word in argv:
        if word.startswith("--"):
            place = passed if "." in word.partition("=")[0] else own
        place.append(word)
    return own, passed


def last_value(flags: Sequence[str], name: str) -> str:
    """Value of an option among arguments, the last one that is given; empty: none is."""
    found = ""
    for word, after in zip(flags, [*flags[1:], ""], strict=False):
        found = after if word == name else found
        found = word.removeprefix(f"{name}=") if word.startswith(f"{name}=") else found
    return found


def parse_options(argv: Sequence[str]) -> Plan:
    """Options of the command; no images are opened yet.

    Raises:
        UserError: an option that is unknown or not allowed, a method or recipe that does not exist.
    """
    own, flags = split_flags(argv)
    about = QualityConfig.__doc__ or ""
    config = parse(QualityConfig(), own, COMMAND_LINE, _PROG, about)
    for name, instead in (("length", "minutes"), ("out", "out"), ("probe-every", "looks")):
        given = last_value(flags, f"--run.{name}")
        check(not given, f"--run.{name} is {given!r}; here it follows from --{instead}")
    train, val = (last_value(flags, f"--data.{name}") for name in ("train", "val"))
    check(bool(train), "--data.train is missing; give labelled images")
    if config.split == "search":
        if val:
            log.info("--split search: --data.val %s is not used", val)
        flags = [*flags, "--data.train", f"kept:{train}", "--data.val", f"held:{train}"]
    check(bool(val) or config.split == "search", "--data.val is missing; or give --split search")
    entries = list(_entries(config.methods, train, flags))
    check(bool(entries), "all recipes are left out, see above; give --methods")
    return Plan(config, flags, entries)


def _entries(asked: str, train: str, flags: list[str]) -> Iterator[Entry]:
    """The recipes that are asked for; of all that fit the data, those that need no other files.

    Raises:
        UserError: no such method or recipe, none fits, or one with options that are not allowed.
    """
    found: dict[str, Path] = {}
    for name in asked.split(",") if asked else method_names():
        fitting = [r for r in recipes() if _fits(r, train) and method_of(r) == name]
        rule = f"--methods has {name!r}; no"
        if name in method_names():
            check(
                bool(fitting) or not asked, f"{rule} recipe of it fits {train!r}; give one by name"
            )
            found |= {recipe: recipes()[recipe] for recipe in fitting}
            continue
        known = name in recipes() or Path(name).expanduser().is_file()
        near = did_you_mean(name, [*method_names(), *recipes()])
        check(known, f"{rule} method, recipe or file of that name{near}")
        file = recipes().get(name) or Path(name).expanduser()
        check(found.get(file.stem, file) == file, f"--methods has two files named {file.stem!r}")
        found[file.stem] = file
    check(
        bool(found),
        f"no recipe fits {train!r}: none's name ends in a word of it; give --methods with recipes "
        f"by name: {', '.join(recipe for recipe in recipes() if method_of(recipe))}",
    )
    for name, file in found.items():
        entry = _entry(name, file, flags)
        try:
            _try_out(entry)
        except UserError as error:
            if asked:
                raise
            log.info("%s is left out: %s", name, error)
        else:
            yield entry


def _entry(name: str, file: Path, flags: list[str]) -> Entry:
    """Recipe with its options: defaults < recipe < command line."""
    method = method_of(name)
    check(bool(method), f"{file}: its name must begin with a method, as METHOD_ANYTHING.yaml")
    own = find_options(method)
    read = PretrainConfig[own.config]  # type: ignore[name-defined]
    default = default_options(PretrainConfig, own)
    return Entry(name, method, file, layered(default, [file], flags, _PROG, "", read))


def _try_out(entry: Entry) -> None:
    """Build the network without memory, so that what a recipe lacks is reported at once.

    Raises:
        UserError: it cannot be built, as where it needs weights that are not there.
    """
    from ssl_vit.methods.base import find_method
    from ssl_vit.model.architecture import without_memory

    kind, options = find_method(entry.method), entry.options
    with without_memory():
        built = kind(options.method, options.encoder, options.data.channels)
    if kind.view_spec(options.method, built.encoder).phases:
        log.warning("warning: %s: its speed is measured in the first of its phases", entry.name)


def _fits(recipe: str, train: str) -> bool:
    """True if the name of a recipe ends in a word of a source's name."""
    return recipe.rpartition("_")[2] in re.split(r"[^a-z0-9]+", train.lower())
