"""Option checks, written once: each names the option, the value given and what is allowed.

``config`` is a frozen dataclass of options whose ``prefix`` (a ClassVar; empty: none) is the part
of the option's name before the dot; with the prefix None its fields are no options of any command,
and are named as they are. A tuple is checked value by value; None (not given) passes. All raise
``UserError``.
"""

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ssl_vit.common.errors import check
from ssl_vit.common.schedules import Length


def flag(config: Any, option: str) -> str:
    """Option as written on the command line: ``--method.mask-ratio``."""
    prefix = getattr(config, "prefix", "")
    if prefix is None:
        return option
    return f"--{prefix}{'.' if prefix else ''}{option.replace('_', '-')}"


def check_share(config: Any, *options: str) -> None:
    """Shares and probabilities: in [0, 1]."""
    for option in options:
        _check(config, option, lambda v: 0 <= v <= 1, "it must lie in [0, 1]")


def check_portion(config: Any, *options: str) -> None:
    """Shares of which nothing makes no sense: above 0, at most 1."""
    for option in options:
        _check(config, option, lambda v: 0 < v <= 1, "it must be above 0 and at most 1")


def check_inside(config: Any, *options: str) -> None:
    """Shares of which neither nothing nor all makes sense: between 0 and 1."""
    for option in options:
        _check(config, option, lambda v: 0 < v < 1, "it must lie between 0 and 1")


def check_below_one(config: Any, *options: str) -> None:
    """Shares of which all makes no sense: in [0, 1)."""
    for option in options:
        _check(config, option, lambda v: 0 <= v < 1, "it must lie in [0, 1)")


def check_least(config: Any, least: int, *options: str) -> None:
    """Counts: ``least`` or more."""
    for option in options:
        _check(config, option, lambda v: v >= least, f"it must be {least} or more")


def check_given(config: Any, *options: str) -> None:
    """Lists of which an empty one makes no sense."""
    for option in options:
        given = len(getattr(config, option)) > 0
        check(given, f"{flag(config, option)} is empty; it must have a value")


def check_positive(config: Any, *options: str) -> None:
    """Finite numbers above 0."""
    for option in options:
        _check(config, option, lambda v: 0 < v < math.inf, "it must be above 0")


def check_not_negative(config: Any, *options: str) -> None:
    """Finite numbers from 0 on."""
    for option in options:
        _check(config, option, lambda v: 0 <= v < math.inf, "it must be 0 or more")


def check_range(config: Any, *options: str, most: float = 1.0) -> None:
    """Ranges (least, most): above 0, in order, and at most ``most``."""
    for option in options:
        low, high = getattr(config, option)
        allowed = "0 < least <= most" + (f" <= {most:g}" if most < math.inf else "")
        fits = 0 < low <= high <= most and high < math.inf
        check(fits, f"{flag(config, option)} is {low:g} {high:g}; it must be {allowed}")


def check_heads(config: Any, option: str, width: str, heads: int) -> None:
    """Attention heads, which divide the width that another option gives."""
    wide = getattr(config, width)
    rule = f"it must divide {flag(config, width)}, {wide}"
    check(wide % heads == 0, f"{flag(config, option)} is {heads}; {rule}")


def check_file(out: str, what: str = "", *suffixes: str) -> None:
    """Files to write, by ``--out``: in a folder that is there; where ``what`` it is has suffixes,
    with one of them. Empty passes."""
    path = Path(out).expanduser()
    check(not (out and suffixes and path.is_dir()), f"--out is {out!r}, a folder; name a file")
    fits = not (out and suffixes) or path.suffix.lower() in suffixes
    check(fits, f"--out is {out!r}; {what}, its name must end in {''.join(suffixes[:1])}")
    check(path.parent.is_dir(), f"--out is {out!r}; there is no folder {str(path.parent)!r}")


def check_features(features: Sequence[str], allowed: Collection[str]) -> None:
    """Features of an encoder, by ``--features``: of those ``allowed``."""
    strange = [name for name in features if name not in allowed]
    check(not strange, f"--features has {strange}; allowed: {', '.join(allowed)}")


def is_number(text: str) -> bool:
    """True if a text is a number; nan and infinity are."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_size(config: Any, *options: str) -> None:
    """Height and width in pixels, one number for both, or nothing."""
    for option in options:
        value = getattr(config, option)
        shown = " ".join(map(str, value))
        fits = len(value) <= 2 and all(side > 0 for side in value)
        check(fits, f"{flag(config, option)} is {shown}; allowed: one number above 0, or two")


def check_divides(
    config: Any, option: str, size: tuple[int, int], patch: int, whose: str = "the"
) -> None:
    """Height and width in pixels that a patch size divides; ``whose``: that of another encoder."""
    fits, shown = all(side > 0 and side % patch == 0 for side in size), "x".join(map(str, size))
    rule = f"{whose} patch size, {patch}, must divide it"
    check(fits, f"{flag(config, option)} is {shown}; {rule}")


def whole_patches(height: float, width: float, patch: int) -> tuple[int, int]:
    """Height and width rounded to whole patches, one at the least."""
    return patch * max(1, round(height / patch)), patch * max(1, round(width / patch))


def check_length(config: Any, *options: str, positive: bool = False, share: bool = False) -> None:
    """Spans of training: epochs as 10ep, or steps as 500st; ``share``: or of the run, as 10%."""
    for option in options:
        value, name = getattr(config, option), flag(config, option)
        span = Length.parse(value, name, share)
        check(span.amount > 0 or not positive, f"{name} is {value!r}; it must be above 0")


def _check(config: Any, option: str, allowed: Callable[[Any], bool], rule: str) -> None:
    value = getattr(config, option)
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    shown = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
    check(all(allowed(v) for v in values), f"{flag(config, option)} is {shown}; {rule}")
