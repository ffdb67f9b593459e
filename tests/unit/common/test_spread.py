"""Patterns that the shell has spread are told as such, with the pattern in quotes."""

from dataclasses import dataclass, field

import pytest

from ssl_vit.common.errors import UserError
from ssl_vit.common.layers import COMMAND_LINE, parse
from ssl_vit.common.reading import DataConfig
from ssl_vit.common.spread import pattern_of


@dataclass(frozen=True)
class Options:
    """Options with a path, a name and a list."""

    data: DataConfig = field(default_factory=DataConfig)
    name: str = ""
    images: tuple[str, ...] = ()


def read(*flags: str) -> Options:
    return parse(Options(), flags, COMMAND_LINE, "program")


@pytest.mark.parametrize(
    ("paths", "pattern"),
    [
        (["s/t-000000.tar", "s/t-000001.tar", "s/t-000002.tar"], "s/t-{000000..000002}.tar"),
        (["t-08.tar", "t-09.tar", "t-10.tar", "t-11.tar"], "t-{08..11}.tar"),
        (["t-0.tar", "t-2.tar"], "t-{0,2}.tar"),
        (["a/x.tar", "b/x.tar"], "{a,b}/x.tar"),
        ([f"t-{c}.tar" for c in "abcdefghij"], "t-*.tar"),
    ],
)
def test_the_pattern_of_some_paths(paths, pattern):
    assert pattern_of(paths) == pattern


@pytest.mark.parametrize(
    "flags",
    [
        ("--data.train", "tar:s/0.tar", "tar:s/1.tar", "--name", "x"),
        ("--name", "x", "--data.train", "tar:s/0.tar", "tar:s/1.tar"),
        ("--data.train=tar:s/0.tar", "--data.train=tar:s/1.tar"),
    ],
)
def test_a_spread_pattern_is_told(flags):
    """Of the last form the parser alone would take the last shard, without a word."""
    with pytest.raises(UserError) as caught:
        read(*flags)
    text = str(caught.value)
    assert text.startswith("--data.train has 2 values")
    assert text.endswith("quote it: --data.train 'tar:s/{0..1}.tar'")


def test_of_several_folders_none_is_a_pattern():
    with pytest.raises(UserError, match=r"--data.train has 2 folders; give one, the one above"):
        read("--data.train", "folder:x/a", "folder:x/b")


def test_other_mistakes_and_repeated_options_are_as_before():
    for flags in (("--name", "a", "b"), ("--nmae", "a")):
        with pytest.raises(UserError, match="unknown option"):
            read(*flags)
    assert read("--name", "a", "--data.holdout", "3", "--name", "b").name == "b"
    assert read("--name=a/b", "--name=a/b").name == "a/b"
    assert read("--images", "a/1.png", "a/2.png").images == ("a/1.png", "a/2.png")
