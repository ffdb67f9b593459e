"""Classes from the values of a column: numbers, floats such as 1.0, booleans, names, and blanks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

LABEL_NAMES = ("label", "labels", "class", "cls", "target", "targets", "y")
"""Names by which a column is known to hold labels, the most usual first."""
NO_CLASS = "no class"
"""Key of a mapping that stands for a value which is no class, and says what it is."""
# Above this, numbers are identifiers of classes, not places in a list of them.
_LARGEST = 100_000
_UNKNOWN = ("", "nan")
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")


class NoClasses(ValueError):  # noqa: N818  # a finding about data, not a failure
    """Values that are no classes; the message is the reason."""


def is_label_name(name: str) -> bool:
    """True for a column's name that says what it holds: ``label``, ``Class``, ``target``."""
    return name.strip().lower() in LABEL_NAMES


def plain_value(value: Any) -> int | float | bool | str | None:
    """A value as a number, a boolean or a text; None where it is unknown.

    Unknown are None, NaN, blanks, and negative numbers, also as text. Whole floats become integers.

    Raises:
        NoClasses: it is a list or the like.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        text = value.strip()
        negative = _WHOLE.fullmatch(text) and float(text) < 0
        return None if negative or text.lower() in _UNKNOWN else text
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, dict) and NO_CLASS in value:
        raise NoClasses(f"holds {value[NO_CLASS]}, which is no class")
    if not isinstance(value, (int, float)):
        raise NoClasses(f"holds a {type(value).__name__} such as {str(value)[:40]}")
    if math.isnan(value) or value < 0:
        return None
    return int(value) if float(value).is_integer() else value


def classes_of(values: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class number of each of some distinct values, int64 (n,), -1 where unknown; class names.

    Numbers are the classes' own numbers, so that 0 and 2 leave a place for 1; very large ones, and
    names, are numbered in order. Names that are all numbers are sorted as numbers.

    Raises:
        NoClasses: the values cannot be classes, or none is known.
    """
    plain = [plain_value(value) for value in values]
    known = [value for value in plain if value is not None]
    if not known:
        raise NoClasses("holds no label: it is always blank or negative")
    broken = [value for value in known if isinstance(value, float)]
    if broken:
        raise NoClasses(f"holds numbers such as {broken[0]:g}, which are no classes")
    if all(isinstance(value, bool) for value in known):
        return _numbers([None if v is None else int(v) for v in plain]), ("False", "True")
    numbers = [value for value in known if isinstance(value, int)]
    if len(numbers) == len(known) and max(numbers) < _LARGEST:
        return _numbers(plain), tuple(map(str, range(max(numbers) + 1)))
    return _by_name(plain)


def class_of_each(
    ids: np.ndarray, values: Sequence[Any], asked: bool = False
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class of each image, int64 (n,), -1 where unknown; class names.

    Args:
        ids: for each image the index of its value, -1 for none.
        asked: the column was asked for; otherwise names of which none occurs twice are no classes.

    Raises:
        NoClasses: the values cannot be classes.
    """
    used = np.unique(ids[ids >= 0])
    numbers, classes = classes_of([values[i] for i in used])
    place = np.full(len(values) + 1, -1, dtype=np.int64)
    place[used] = numbers
    labels = place[ids]
    named = any(isinstance(values[i], str) for i in used)
    if named and not asked and len(used) > 1 and np.bincount(labels[labels >= 0]).max() < 2:
        raise NoClasses("is another text for each image")
    return labels, classes


def _numbers(plain: Sequence[Any]) -> np.ndarray:
    return np.array([-1 if value is None else int(value) for value in plain], dtype=np.int64)


def _by_name(plain: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Number names in order; ``1.0`` is ``1`` where all are whole numbers."""
    texts = ["" if value is None else str(value) for value in plain]
    known = [text for text in texts if text]
    if all(_WHOLE.fullmatch(text) for text in known):
        texts = [text.partition(".")[0] for text in texts]
        names = sorted(set(texts) - {""}, key=lambda text: (int(text), text))
    else:
        names = sorted(set(known))
    number = {name: i for i, name in enumerate(names)} | {"": -1}
    return np.array([number[text] for text in texts], dtype=np.int64), tuple(names)


def is_outcome(value: Any) -> bool:
    """True for 1, 0, and unknown: the values of a label that an image has or has not."""
    try:
        return _outcome(value) is not None
    except NoClasses:
        return False


def outcomes_of(values: Sequence[Any]) -> np.ndarray:
    """Outcome of each of some distinct values, float32 (n,): 1, 0, or NaN for unknown.

    Raises:
        NoClasses: another value is among them.
    """
    found = [_outcome(value) for value in values]
    strange = [v for v, outcome in zip(values, found, strict=True) if outcome is None]
    if strange:
        raise NoClasses(f"is {strange[0]!r}; several columns hold 1, 0, or nothing for unknown")
    return np.array(found, dtype=np.float32)


def _outcome(value: Any) -> float | None:
    """1, 0, NaN for unknown, None for anything else."""
    plain = plain_value(value)
    if plain is None:
        return math.nan
    text = str(int(plain) if isinstance(plain, bool) else plain).lower()
    known = {"1": 1.0, "1.0": 1.0, "true": 1.0, "0": 0.0, "0.0": 0.0, "false": 0.0}
    return known.get(text)
