"""Options of made-up scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssl_vit.common.checks import check_least
from ssl_vit.common.layers import COMMAND_LINE, parse

_PROG = "python -m ssl_vit.benchmark scenes"


@dataclass(frozen=True)
class ScenesConfig:
    """Made-up scenes with known boxes, masks and depths, for detect, segment and depth: rooms in
    which objects stand. Written are images/, masks/, depth/ and annotations.json."""

    out: str = "scenes"
    """A new folder."""
    objects: str = "digits:train"
    """Images with labels, which stand in the rooms. For other scenes to evaluate on: others, as
    digits:val."""
    surfaces: str = ""
    """Images that cover walls and floors. Empty: patterns of colours."""
    count: int = 1000
    """Number of scenes."""
    size: int = 128
    """Height and width of an image in pixels."""
    most: int = 6
    """Most objects in a scene."""
    seed: int = 0
    """Scenes of another seed are others."""

    def __post_init__(self) -> None:
        check_least(self, 1, "count", "most")
        check_least(self, 32, "size")


def parse_options(argv: Sequence[str]) -> ScenesConfig:
    """Options of the command.

    Raises:
        UserError: an option that is unknown or not allowed.
    """
    return parse(ScenesConfig(), list(argv), COMMAND_LINE, _PROG, ScenesConfig.__doc__ or "")
