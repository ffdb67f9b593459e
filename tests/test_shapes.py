"""Signatures are checked in tests: shapes, types, functions within functions, fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from ssl_vit.common.config import OptimConfig
from ssl_vit.common.seeds import fold, fold_keys
from tests.shapes import checked

Pair = dict[str, Float[Tensor, "n n"]]


def check(fn: Any) -> Any:
    """As the import hook does."""
    return checked(fn, typechecker=beartype)


@check
def total(values: Float[Tensor, "n d"], weights: Float[Tensor, " n"]) -> Float[Tensor, " d"]:
    """Of rows; nothing of the kind if there are nine."""
    return weights @ values if len(values) < 9 else weights


@check
def square(pair: Pair) -> None:
    """A name that stands for shapes."""


@check
def repeated(word: str, *counts: int, by: int | None = None) -> str:
    """A word, so many times; something else by 13."""
    return word * sum(counts) if by != 13 else by


@check
def within(count: object, rows: object) -> Any:
    """Two functions within this one."""

    @check
    def inner(count: int) -> str:
        return "a" * count

    @check
    def first(rows: Float[Tensor, "n d"], count: int) -> Float[Tensor, "{count} d"]:
        return rows

    return inner(count), first(rows, count)


@check
def later(made: Later) -> Iterator[Later]:
    """A class that is not there when this is defined."""
    yield made


@check
@dataclass(frozen=True)
class Later:
    """One whose fields are checked."""

    rate: float
    name: str = "later"


def test_what_fits_passes():
    """And every value comes through."""
    assert total(torch.ones(3, 2), torch.ones(3)).tolist() == [3, 3]
    square({"a": torch.ones(2, 2)})
    assert repeated("a", 1, 2, by=3) == "aaa"
    assert within(2, torch.ones(2, 3))[0] == "aa"
    assert next(later(Later(0.5))) == Later(rate=0.5, name="later")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: total(torch.ones(3, 2), torch.ones(2)),
        lambda: total(torch.ones(9, 2), torch.ones(9)),
        lambda: total(torch.ones(3, 2), weights=torch.ones(3).long()),
        lambda: square({"a": torch.ones(2, 3)}),
        lambda: square(pair={"a": 3}),
        lambda: repeated(3, 1),
        lambda: repeated("a", 1, "b"),
        lambda: repeated("a", by=0.5),
        lambda: repeated("a", by=13),
        lambda: within("b", torch.ones(2, 3)),
        lambda: within(2, torch.ones(3, 3)),
        lambda: later("b"),
        lambda: Later("b"),
        lambda: Later(0.5, name=3),
        lambda: fold("b"),
        lambda: fold_keys(torch.ones(3, 2).long(), 1),
        lambda: OptimConfig(clip="b"),
    ],
)
def test_what_does_not_is_an_error(wrong):
    """Also in the package, by the hook."""
    with pytest.raises(TypeCheckError):
        wrong()
