"""Grids of positions: rows and columns of the patches that a network was trained on.

A table of positions has a length only; 256 of them may be 16 x 16 patches or 8 x 32. Each grid is
read from what is certain where there is something, and what is assumed is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ssl_vit.common.errors import UserError
from ssl_vit.model.positions import sincos_positions


@dataclass(frozen=True)
class Hints:
    """Architecture hints, where shapes are ambiguous.

    ``image_size``: height and width in a configuration, which must hold. ``stated_size``: those of
    images among the options of a training. ``square``: a format that knows no other grids.
    ``given_size``: the user's, of which a file's own grid is only one reading. ``rope_periods``:
    of rotary positions.
    """

    arch: str = ""
    heads: int = 0
    norm_eps: float = 0.0
    image_size: tuple[int, int] | None = None
    stated_size: tuple[int, int] | None = None
    square: bool = False
    given_size: tuple[int, ...] = ()
    rope_periods: tuple[float, ...] = ()


@dataclass(frozen=True)
class Grid:
    """Grid of a table of positions.

    ``fixed``: whether they are MAE's sine-cosine ones, which stay as they are; ``note``: what is
    assumed, empty where nothing is.
    """

    rows: int
    columns: int
    fixed: bool = False
    note: str = ""


def find_grid(
    table: Float[Tensor, "n d"],
    patch: int,
    hints: Hints,
    own: tuple[int, int] | None,
    where: str,
) -> Grid:
    """Grid of the positions ``table`` of patches of ``patch`` pixels.

    Certain are a configuration, the values of sine-cosine positions, and, if of as many patches,
    the options of the training, a format of square grids alone, and the architecture's ``own``
    grid. Else the user's size is taken if it is of as many patches, then a square.

    Raises:
        UserError: nothing states it, and the positions are no square number; with the remedy.
    """
    n = len(table)
    by_values = _sincos_grid(table)
    fits = [s for s in (hints.image_size, _if_fits(hints.stated_size, n, patch)) if s]
    if hints.image_size is None and by_values:
        return Grid(*by_values, fixed=True)
    if fits:
        rows, columns = (side // patch for side in fits[0])
        return Grid(rows, columns, (rows, columns) == by_values)
    if own and math.prod(own) == n:
        return Grid(*own)
    side = square_side(n)
    if hints.square and side:
        return Grid(side, side)
    given = _if_fits(hints.given_size, n, patch)
    if given and given[0] != given[1]:
        rows, columns = given[0] // patch, given[1] // patch
        return Grid(
            rows, columns, note=f"its {n} positions are {rows}x{columns}, by the size given"
        )
    if side:
        return Grid(side, side, note=_assumption(side, patch))
    raise UserError(f"{where}: {_how_to_say(n, patch)}")


def prefix_has_positions(positions: int, prefix: int, patch: int, hints: Hints) -> bool:
    """True if among so many positions are some of the ``prefix`` tokens before the patches."""
    rest = positions - prefix
    for size in (hints.image_size, hints.stated_size):
        if size and _if_fits(size, positions, patch):
            return False
        if size and _if_fits(size, rest, patch):
            return True
    if _if_fits(hints.given_size, rest, patch) or square_side(rest):
        return True
    return not square_side(positions) and not _if_fits(hints.given_size, positions, patch)


def square_side(number: int) -> int:
    """Side of a square grid with this number of patches; 0 if not a square."""
    side = math.isqrt(max(number, 0))
    return side if side * side == number else 0


def _if_fits(size: tuple[int, ...] | None, n: int, patch: int) -> tuple[int, int] | None:
    """Height and width, if images of this size have ``n`` patches."""
    if not size or any(side % patch for side in size):
        return None
    height, width = size[0], size[-1]
    return (height, width) if (height // patch) * (width // patch) == n else None


def _sincos_grid(table: Float[Tensor, "n d"]) -> tuple[int, int] | None:
    """Grid whose sine-cosine positions these are; None if they are none, or have no values."""
    n, width = table.shape
    if table.is_meta or width % 4 or not n:
        return None
    for rows in (r for r in range(1, n + 1) if n % r == 0):
        if torch.allclose(table.float(), sincos_positions((rows, n // rows), width), atol=1e-4):
            return rows, n // rows
    return None


def _assumption(side: int, patch: int) -> str:
    """Assumption of a square grid, and the options for another: half as high, twice as wide."""
    other = f"{side * patch // 2} {side * patch * 2}" if side % 2 == 0 else "HEIGHT WIDTH"
    return f"a square grid of {side}x{side} patches is assumed; {_options(other)} for another"


def _how_to_say(n: int, patch: int) -> str:
    """Remedy for positions that form no square."""
    rows = max(r for r in range(1, math.isqrt(max(n, 1)) + 1) if n % r == 0)
    size = f"{rows * patch} {n // rows * patch}"
    return (
        f"pos_embed has {n} positions for patches; not a square grid: give height and width of its "
        f"images, as {_options(size)}"
    )


def _options(size: str) -> str:
    """Options for a size, by command."""
    return f"--encoder.image-size {size} (elsewhere --size, finetune: --tune.image-size)"
