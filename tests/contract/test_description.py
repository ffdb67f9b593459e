"""What a method says of itself: its names, its options, its numbers, and what to do about them."""

import dataclasses
import inspect
import pkgutil
import re

import pytest
import torch

from ssl_vit import options
from ssl_vit.commands.cli import recipes
from ssl_vit.common.layers import known_keys
from ssl_vit.common.scalars import Scalar
from ssl_vit.methods import find_options
from ssl_vit.objectives.base import Objective, Setting
from ssl_vit.options.base import MethodConfig
from tests.contract import tiny

# What a run of nothing but trouble looks like.
TROUBLE = Setting(images=10**6, batch_size=8, parts=4, lacking=2.0**30, per_crop=2.0**28)


def documented(kind: type, field: str) -> bool:
    """Whether a string stands below the field, in the class or one that it derives from."""
    pattern = rf'^    {field}:[^\n]*\n    """\S'
    sources = [inspect.getsource(base) for base in kind.__mro__ if dataclasses.is_dataclass(base)]
    return any(re.search(pattern, source, re.M) for source in sources)


def test_it_has_a_recipe_for_digits(name):
    """What pretrain NAME alone runs."""
    assert tiny.recipe(name) in recipes()


def test_it_has_a_name_for_people_and_a_docstring(kind):
    assert kind.title.strip()
    assert (kind.__doc__ or "").strip()
    assert (kind.Config.__doc__ or "").strip()


def test_its_options_are_its_own(name, kind):
    """In options/, where it has a file there; else beside the method."""
    assert find_options(name) == (kind.Config, kind.defaults, kind.title, kind.explained)
    apart = name in {m.name for m in pkgutil.iter_modules(options.__path__)}
    assert kind.Config.__module__ == f"ssl_vit.{'options' if apart else 'methods'}.{name}"


def test_its_options_are_frozen_and_documented(name, kind):
    assert issubclass(kind.Config, MethodConfig)
    method = tiny.options(name)[1].method
    assert type(method) is kind.Config
    for option in tiny.method_options(method):
        assert documented(type(option.owner), option.name), f"{option.flag} has no docstring"
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(option.owner, option.name, option.value)


def test_every_number_is_explained(kind, made):
    """Each that a step returns; of those on the progress line, each is one that it returns."""
    scalars = made.task(tiny.first_views(made), 0)
    assert "loss" in scalars
    assert set(scalars) <= set(kind.explained), "returned, and not in explained"
    assert set(kind.progress) <= set(scalars)
    for value in scalars.values():
        assert isinstance(value, torch.Tensor)
        assert value.shape == ()
    titles = [scalar.title for scalar in kind.explained.values()]
    assert len(set(titles)) == len(titles)
    for key, scalar in kind.explained.items():
        assert isinstance(scalar, Scalar)
        assert scalar.title[:1].isupper(), key
        assert scalar.meaning.endswith("."), key


def test_its_advice_names_options_that_exist(made):
    """Of a sound step, and in a setting that asks for all the advice there is."""
    known = {f"--{key.replace('_', '-')}" for key in known_keys(made.config)}
    means = {key: value.item() for key, value in made.task(tiny.first_views(made), 0).items()}
    lines = [*made.task.advice(TROUBLE), *made.task.concerns(means).values()]
    assert set(re.findall(r"--[a-z]+\.[a-z.-]*[a-z]", " ".join(lines))) <= known


def test_it_reconstructs_if_it_says_so(kind, made):
    objectives = [type(o) for _, o in made.task.parts()]
    able = [o.reconstruct is not Objective.reconstruct for o in objectives]
    assert kind.reconstructs == any(able)
