"""Scalar: what a logged number is, for people. A report on a run reads it without torch."""

from __future__ import annotations

from typing import NamedTuple


class Scalar(NamedTuple):
    """Description of a logged number for people.

    ``title``: its name for people. ``meaning``: its meaning, and how it should move, in a sentence
    or two. ``falls``: whether a sound training makes it fall; None: it may do either.
    """

    title: str
    meaning: str = ""
    falls: bool | None = None
