"""What a method lets people see: panels, reconstructions, and its curves in a report."""

import copy
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_vit import report, visualize
from ssl_vit.common.task import Views
from ssl_vit.data.normalize import Normalize
from ssl_vit.methods.base import Method
from ssl_vit.training.panels import panels
from tests.contract import tiny

IMAGES = 3


@pytest.fixture
def seen(made: tiny.Pretraining) -> tuple[Method, Views, Normalize]:
    """A method, and images as an evaluation shows them: one crop each, and nothing drawn."""
    images = torch.randn(IMAGES, 1, 16, 16)
    views = Views([images], torch.arange(IMAGES), torch.full((IMAGES,), -1))
    return copy.deepcopy(made.task).eval(), views, made.trainer.normalize


def test_panels_are_pictures_and_functions_of_the_images(seen):
    task, views, normalize = seen
    before = tiny.state(task)
    found, again = (task.panels(views, normalize) for _ in range(2))
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    assert found.keys() == again.keys()
    for key, picture in found.items():
        assert picture.dtype == np.uint8
        assert picture.ndim == 3
        assert picture.shape[2] == 3
        assert min(picture.shape[:2]) >= 16
        assert np.array_equal(picture, again[key])


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_reconstructions_are_of_equal_shapes(kind, seen, ratio):
    task, views, normalize = seen
    if not kind.reconstructs:
        return
    images = views.crops[0]
    found = task.reconstruct(images, views.keys, normalize, ratio)
    assert found.caption.strip()
    assert len(found.pictures) >= 2
    for picture in found.pictures.values():
        assert picture.dtype == np.uint8
        assert picture.shape == (IMAGES, 16, 16, 3)
    other = task.reconstruct(images, views.keys + 1, normalize, ratio)
    pairs = zip(found.pictures.values(), other.pictures.values(), strict=True)
    assert not all(np.array_equal(one, two) for one, two in pairs), "masks ignore the keys"


def test_a_run_is_shown_by_visualize_where_it_reconstructs(kind, run, tmp_path):
    if not kind.reconstructs:
        return
    out = tmp_path / "seen.png"
    given = ("--encoder", str(run), "--images", "digits:val", "--count", "2", "--out", str(out))
    assert visualize.main(["reconstruction", *given]) == 0
    assert out.stat().st_size > 0


@pytest.fixture(scope="session")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a run, as people read it."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert report.main([str(run), "--out", str(out)]) == 0
    return unescape(out.read_text())


def test_the_report_explains_every_number_of_a_step(kind, run, page):
    explained = {key: kind.explained[key] for key in tiny.losses(run)[0] if key in kind.explained}
    assert "loss" in explained
    for scalar in explained.values():
        assert scalar.title in page
        assert scalar.meaning in page
    assert kind.title in page


def test_the_run_and_its_report_have_every_panel(seen, run, page):
    """As it was after the last step."""
    task, views, normalize = seen
    kept = panels(run)
    for key in task.panels(views, normalize):
        assert tiny.STEPS in kept[key]
        assert key in page
