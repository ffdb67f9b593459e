"""The shared option checks: what passes, and the one line that each gives."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest

from ssl_vit.common.checks import (
    check_features,
    check_file,
    check_given,
    check_heads,
    check_least,
    check_length,
    check_not_negative,
    check_positive,
    check_range,
    check_share,
    check_size,
    flag,
)
from ssl_vit.common.errors import UserError


@dataclass(frozen=True)
class Options:
    prefix: ClassVar[str] = "method"
    one_value: object = 0


@dataclass(frozen=True)
class Bare:
    one_value: object = 0


@dataclass(frozen=True)
class Fields:
    prefix: ClassVar[None] = None
    one_value: object = 0


def above(config, *options):
    check_length(config, *options, positive=True)


def without_most(config, *options):
    check_range(config, *options, most=math.inf)


def at_least_2(config, *options):
    check_least(config, 2, *options)


CHECKS = {
    check_share: ([0, 1, 0.5, (), (0.0, 1.0)], {
        1.5: "1.5; it must lie in [0, 1]",
        -0.1: "-0.1; it must lie in [0, 1]",
        math.nan: "nan; it must lie in [0, 1]",
        (1.0, 2.0, 0.0): "1 2 0; it must lie in [0, 1]",
    }),
    at_least_2: ([2, 10**9, (2, 3)], {
        1: "1; it must be 2 or more",
        -7: "-7; it must be 2 or more",
        (5, 1): "5 1; it must be 2 or more",
    }),
    check_positive: ([1e-9, 7], {
        0.0: "0; it must be above 0",
        -1.0: "-1; it must be above 0",
        math.inf: "inf; it must be above 0",
        math.nan: "nan; it must be above 0",
    }),
    check_given: ([(0,), (1.0, 2.0)], {(): "empty; it must have a value"}),
    check_not_negative: ([0, 0.5], {
        -0.5: "-0.5; it must be 0 or more",
        math.inf: "inf; it must be 0 or more",
        math.nan: "nan; it must be 0 or more",
    }),
    check_range: ([(0.2, 1.0), (0.5, 0.5)], {
        (0.5, 0.4): "0.5 0.4; it must be 0 < least <= most <= 1",
        (0.0, 1.0): "0 1; it must be 0 < least <= most <= 1",
        (0.1, 1.5): "0.1 1.5; it must be 0 < least <= most <= 1",
        (0.1, math.nan): "0.1 nan; it must be 0 < least <= most <= 1",
    }),
    without_most: ([(0.1, 200.0)], {
        (2.0, 1.0): "2 1; it must be 0 < least <= most",
        (1.0, math.inf): "1 inf; it must be 0 < least <= most",
    }),
    check_size: ([(), (8,), (8, 12)], {
        (8, 8, 8): "8 8 8; allowed: one number above 0, or two",
        (0,): "0; allowed: one number above 0, or two",
        (8, -1): "8 -1; allowed: one number above 0, or two",
    }),
    check_length: (["10ep", "500st", "0ep", "1.5ep"], {}),
    above: (["10ep", "1st"], {"0ep": "'0ep'; it must be above 0"}),
}  # fmt: skip
GOOD = [(check, value) for check, (good, _) in CHECKS.items() for value in good]
BAD = [(check, value, said) for check, (_, bad) in CHECKS.items() for value, said in bad.items()]


@pytest.mark.parametrize(("check", "value"), GOOD)
def test_what_passes(check, value):
    check(Options(value), "one_value")
    check(Options(value))


@pytest.mark.parametrize(("check", "value", "said"), BAD)
def test_what_is_refused(check, value, said):
    """By the option as it is written, with or without a group, or by the field."""
    names = {Options: "--method.one-value", Bare: "--one-value", Fields: "one_value"}
    for config, name in ((kind(value), name) for kind, name in names.items()):
        with pytest.raises(UserError) as refusal:
            check(config, "one_value")
        assert str(refusal.value) == f"{name} is {said}"


@pytest.mark.parametrize("value", ["10", "ep", "-1ep", "nanep", "10 epochs"])
def test_a_length_that_is_none(value):
    with pytest.raises(UserError, match=r"--method\.one-value is '"):
        check_length(Options(value), "one_value")


def test_files_to_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    picture = "the picture is a PNG file", ".png"
    for out in ("", "a.png", "A.PNG", f"{tmp_path}/a.png"):
        check_file(out, *picture)
    check_file("of_any_kind")
    with pytest.raises(UserError, match=r"^--out is 'folder.png', a folder; name a file$"):
        check_file("folder.png", *picture)
    for out in ("a.jpg", "a"):
        with pytest.raises(UserError, match=r"is a PNG file, its name must end in \.png$"):
            check_file(out, *picture)
    with pytest.raises(UserError, match=r"^--out is 'b/a.png'; there is no folder 'b'$"):
        check_file("b/a.png", *picture)


def test_features_and_heads():
    check_features(("cls", "mean"), {"cls": 1, "mean": 2, "pixels": 3})
    with pytest.raises(UserError, match=r"^--features has \['max'\]; allowed: cls, mean$"):
        check_features(("cls", "max"), ("cls", "mean"))
    made = dataclasses.make_dataclass("Wide", [("head_width", int)])
    check_heads(made(96), "heads", "head_width", 3)
    with pytest.raises(UserError, match=r"^--heads is 5; it must divide --head-width, 96$"):
        check_heads(made(96), "heads", "head_width", 5)


def test_every_option_is_checked():
    made = dataclasses.make_dataclass("Two", [("a", float), ("b", float)])
    with pytest.raises(UserError, match=r"^--b is 2; "):
        check_share(made(0.5, 2.0), "a", "b")


def test_flags():
    assert flag(Options(), "mask_ratio") == "--method.mask-ratio"
    assert flag(Bare(), "mask_ratio") == "--mask-ratio"
    assert flag(Fields(), "mask_ratio") == "mask_ratio"
