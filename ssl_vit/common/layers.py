"""Option layers: from YAML files and the command line, by one parser, and back to YAML."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from ssl_vit.common.errors import UserError, check, did_you_mean
from ssl_vit.common.spread import refuse_spread

T = TypeVar("T")
COMMAND_LINE = "command line"
# Options of a single call, which are not saved in the run's config.
_OF_THE_CALL = ("config", "dry_run")
# Options by the names that files of earlier runs have for them.
_MOVED = {
    "method.layer_decay": "optim.layer_decay",
    "method.patch_lr": "optim.patch_lr",
}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings, keys joined by dots: ``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def written(tree: dict[str, Any]) -> dict[str, Any]:
    """Options of a file, flattened, each by its present name."""
    return {_MOVED.get(key, key): value for key, value in flatten(tree).items()}


def _values(config: Any) -> dict[str, Any]:
    """Values of all options of a config object, as ``group.option``."""
    return flatten(dataclasses.asdict(config))


def known_keys(config: Any) -> list[str]:
    """Keys of a config object allowed in a YAML file, as ``group.option``."""
    return [key for key in _values(config) if key not in _OF_THE_CALL]


def yaml_flags(path: Path, known: Sequence[str]) -> list[str]:
    """Command-line flags for the options of a YAML file; unknown keys are refused by name."""
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    check(isinstance(tree, dict), f"{path}: must hold groups of options (run, data, ...)")
    return tree_flags(tree, known, str(path))


def tree_flags(tree: dict[str, Any], known: Sequence[str], where: str) -> list[str]:
    """Command-line flags for groups of options; unknown keys are refused, naming ``where``."""
    flags = []
    for key, value in written(tree).items():
        name = key.replace("-", "_")
        check(name in known, f"{where}: unknown key {key!r}{did_you_mean(name, known)}")
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name.replace('_', '-')}", *(str(v) for v in values)]
    return flags


def to_yaml(config: Any) -> str:
    """YAML text of a config object, which reads back to an equal one."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    tree = plain(dataclasses.asdict(config))
    tree = {key: value for key, value in tree.items() if key not in _OF_THE_CALL}
    return yaml.safe_dump(tree, sort_keys=False)


def as_written(config: Any) -> dict[str, Any]:
    """All options as in ``config.yaml``, by ``group.option``."""
    return flatten(yaml.safe_load(to_yaml(config)))


def parse(
    default: T, flags: Sequence[str], where: str, prog: str, about: str = "", kind: object = None
) -> T:
    """Parse command-line ``flags`` into a copy of ``default``; errors name ``where`` they are from.

    ``kind`` is the type of ``default`` if that is generic. On the command line a bool may
    stand alone: ``--flag`` is ``--flag True``.

    Raises:
        UserError: unknown option (with the nearest known one) or a value that is not allowed.
        SystemExit: after ``--help``.
    """
    if {"-h", "--help"} & set(flags):
        _run_tyro(default, ["--help"], prog, about, kind)
    if where == COMMAND_LINE:
        refuse_spread(flags)
        flags = _switches(default, flags)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box), contextlib.redirect_stdout(box):
            config, unknown = _run_tyro(default, list(flags), prog, about, kind)
    except SystemExit:
        raise UserError(f"{where}: {_first_paragraph(box.getvalue())}") from None
    if unknown:
        if where == COMMAND_LINE:
            refuse_spread(flags, unknown)
        known = [f"--{key.replace('_', '-')}" for key in _values(default)]
        name = unknown[0].split("=")[0]
        raise UserError(f"{where}: unknown option {unknown[0]!r}{did_you_mean(name, known)}")
    return config


def _switches(default: Any, flags: Sequence[str]) -> list[str]:
    """Add True after every bool option without a value."""
    bools = {key for key, value in _values(default).items() if isinstance(value, bool)}
    spelled: list[str] = []
    for flag, after in zip_longest(flags, flags[1:], fillvalue="--"):
        spelled.append(flag)
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in bools and after.startswith("--"):
            spelled.append("True")
    return spelled


def _run_tyro(
    default: T, flags: list[str], prog: str, about: str, kind: object
) -> tuple[T, list[str]]:
    """Run tyro with every option written ``--name value``, so that YAML needs no special case."""
    return tyro.cli(  # type: ignore[call-overload]
        kind or type(default),
        default=default,
        args=flags,
        prog=prog,
        description=about or None,
        return_unknown_args=True,
        config=(tyro.conf.FlagConversionOff,),
    )


def _first_paragraph(box: str) -> str:
    """Message in tyro's framed error, on one line: from the title's rule to the next."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    ends = [i for i, line in enumerate(lines) if "─" in line or not line.strip("-")]
    start, stop = [*ends, len(lines), len(lines)][:2]
    text = " ".join(lines[start + 1 : stop]).replace("Error parsing ", "")
    return re.sub(r"^[\w.]+: (?=--)", "", text)
