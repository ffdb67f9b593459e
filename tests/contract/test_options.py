"""A method's options on the command line: in the help, and refused by name where they are wrong."""

import re
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from ssl_vit import pretrain
from ssl_vit.common.errors import UserError
from ssl_vit.methods import method_names
from ssl_vit.methods.base import Method, find_method
from ssl_vit.model.architecture import without_memory
from tests.contract import tiny

_NO_SENSE = {int: -999, float: float("nan"), str: "no such thing"}
OPTIONS = [
    pytest.param(name, option.flag, id=f"{name} {option.flag}")
    for name in method_names()
    for option in tiny.method_options(find_method(name).Config())
]


def nonsense(option: tiny.Option) -> Any:
    """A value of the option's type that no option can mean; None where each may make sense."""
    hint = get_type_hints(type(option.owner))[option.name]
    if get_origin(hint) is Literal or isinstance(option.value, bool) or option.value is None:
        return None
    if isinstance(option.value, tuple):
        kinds = [type(v) for v in option.value] or [get_args(hint)[0]]
        return tuple(_NO_SENSE[kind] for kind in kinds)
    return _NO_SENSE[type(option.value)]


@pytest.mark.parametrize(("name", "flag"), OPTIONS)
def test_nonsense_is_refused_by_name(name, flag):
    """In a line, when options are read or, at the latest, when the method is built."""
    kind, config = tiny.options(name)
    option = next(o for o in tiny.method_options(config.method) if o.flag == flag)
    wrong = nonsense(option)
    if wrong is None:
        return
    with pytest.raises(UserError) as refused:
        built(kind, config, option, wrong)
    assert f"{flag} " in str(refused.value)
    assert "\n" not in str(refused.value)


def built(kind: type[Method], config: Any, option: tiny.Option, value: Any) -> Method:
    """The method with another value of an option."""
    changed = replace(option.owner, **{option.name: value})
    with without_memory():
        return kind(within(config.method, option.owner, changed), config.encoder, 1)


def within(config: Any, old: Any, new: Any) -> Any:
    """The options with a part of them, or all, in another's place."""
    if config is old:
        return new
    parts = {f: v for f, v in vars(config).items() if v is old}
    return replace(config, **dict.fromkeys(parts, new))


def test_the_help_has_every_option_and_80_columns(name, kind, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        pretrain.main([name, "--help"])
    assert not left.value.code
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    shown = set(re.findall(r"(?<!\S)--method\.\S+", text))
    assert shown == {option.flag for option in tiny.method_options(kind.Config())}
