"""All randomness is that of keys and of what workers draw: a step is a function of its views."""

import copy
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssl_vit.common.seeds import fold, generator
from ssl_vit.methods.base import Method
from tests.contract import tiny


def seed_all(seed: int) -> None:
    """Every generator that belongs to nobody."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def numbers(task: Method, views, seed: int) -> dict[str, float]:
    """The scalars of a step in training, by a copy of the task: it stays as it is."""
    seed_all(seed)
    task = copy.deepcopy(task).train()
    return {key: value.item() for key, value in task(views, 0).items()}


def drawn(made, key: int, seed: int) -> dict[str, np.ndarray]:
    """What is drawn for a sample."""
    seed_all(seed)
    return made.views.draw(generator(key)) if made.views.draw else {}


def test_a_step_is_a_function_of_its_views(made):
    views = tiny.first_views(made)
    assert numbers(made.task, views, seed=1) == numbers(made.task, views, seed=2)


def test_other_keys_are_another_step(kind, made):
    """Of a method that hides something, or has something drawn."""
    views = tiny.first_views(made)
    other = views.redrawn(1)
    other = replace(other, drawn=made.task.drawn(other.keys))
    same = numbers(made.task, views, seed=1) == numbers(made.task, other, seed=1)
    drawn = made.views.draw or made.views.draw_together
    assert not (same and (kind.reconstructs or drawn))


def test_what_is_drawn_is_a_function_of_the_generator(made):
    samples = [drawn(made, key, seed=key) for key in range(20)]
    for key, sample in enumerate(samples):
        again = drawn(made, key, seed=99)
        assert sample.keys() == again.keys()
        assert all(np.array_equal(sample[n], again[n]) for n in sample)
    # Keys are something else to each generator: not all samples are one.
    assert not samples[0] or any(
        not np.array_equal(sample[n], samples[0][n]) for sample in samples for n in sample
    )


def test_what_is_drawn_has_one_shape_and_type(made):
    kinds = [{n: (v.shape, v.dtype) for n, v in drawn(made, k, 0).items()} for k in range(50)]
    assert all(kind == kinds[0] for kind in kinds)


def test_the_loader_draws_what_the_method_does_for_the_same_keys(made):
    """Also when a worker, started anew, is told of the views by pickle."""
    views, places = tiny.first_views(made), made.order.places(0, 0)
    again = made.task.drawn(views.keys, places)
    assert views.drawn.keys() == again.keys()
    for key, value in again.items():
        assert torch.equal(views.drawn[key], value)
    again = pickle.loads(pickle.dumps(made.views))
    assert again.crops == made.views.crops
    if again.draw:
        sample = again.draw(generator(fold(int(views.keys[0]))))
        assert all(np.array_equal(sample[n], views.drawn[n][0].numpy()) for n in sample)
    if again.draw_together:
        together = again.draw_together(places)
        assert all(np.array_equal(together[n], views.drawn[n].numpy()) for n in together)


def test_what_is_drawn_together_has_shapes_of_its_places_alone(made):
    """At every step; and other numbers at each."""
    if not made.views.draw_together:
        return
    seed_all(1)
    first = made.views.draw_together(made.order.places(0, 0))
    others = [made.views.draw_together(made.order.places(step, 0)) for step in range(1, 20)]
    for other in others:
        assert {n: v.shape for n, v in other.items()} == {n: v.shape for n, v in first.items()}
        assert any(not np.array_equal(other[n], first[n]) for n in first)
    seed_all(2)
    again = made.views.draw_together(made.order.places(0, 0))
    assert all(np.array_equal(again[n], first[n]) for n in first)


@pytest.mark.parametrize("step", [0, 1])
def test_to_look_at_a_step_changes_no_weight(made, step):
    """Forward alone moves nothing: what moves is moved after the update."""
    before = tiny.state(made.task)
    made.task.train()(tiny.first_views(made), step)
    assert all(torch.equal(value, before[key]) for key, value in made.task.state_dict().items())
