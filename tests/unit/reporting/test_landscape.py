"""The map of images: what the projector's files hold, and that like ones lie together."""

import numpy as np
import pytest
import torch

from ssl_vit.common.errors import UserError
from ssl_vit.reporting.landscape import flattened, read_projection
from ssl_vit.training.energy import Energy
from ssl_vit.training.metrics import RunLog
from ssl_vit.training.panels import projections


def project(folder, features, labels, pictures, step=7, kind="class"):
    """What a run leaves for the projector."""
    folder.mkdir(exist_ok=True)
    log = RunLog(folder, 0, 10, 1, 1, main=True, energy=Energy(torch.device("cpu")))
    with log:
        log.projection(step, torch.from_numpy(features), kind, labels, pictures)
    return folder


def clusters(n=40, d=16):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, d)) * 5
    which = np.arange(n) % 3
    return (centres[which] + rng.normal(size=(n, d))).astype(np.float32), which


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_features_labels_and_pictures_in_order(tmp_path, n):
    features, which = clusters(n)
    pictures = np.random.default_rng(1).integers(0, 256, (n, 6, 6, 3), np.uint8)
    project(tmp_path, features, [f"class {i}" for i in which], pictures)
    found = read_projection(tmp_path)
    assert found.step == 7
    np.testing.assert_allclose(found.features, features, rtol=1e-5)
    np.testing.assert_array_equal(found.pictures, pictures)
    assert found.labels == [f"class {i}" for i in which]
    assert found.classes


def test_a_thousand_classes_are_classes_and_none_are_none(tmp_path):
    """What labels are is written down, not guessed from how many there are."""
    features, _ = clusters()
    pictures = np.zeros((40, 4, 4, 3), np.uint8)
    names = [f"n{i}" for i in range(40)]
    project(tmp_path / "many", features, names, pictures)
    assert read_projection(tmp_path / "many").labels == names
    project(tmp_path / "several", features, names, pictures, kind="labels")
    found = read_projection(tmp_path / "several")
    assert (found.labels, found.classes) == (names, False)
    project(tmp_path / "none", features, [""] * 40, pictures, kind="unlabelled")
    assert read_projection(tmp_path / "none").labels is None


def test_names_that_break_lines_or_are_no_text(tmp_path):
    features, _ = clusters(5)
    names = ["a\nb", "tab\there", "caf\udce9", "line\u2028end", "plain"]
    project(tmp_path, features, names, np.zeros((5, 4, 4, 3), np.uint8))
    found = read_projection(tmp_path).labels
    assert found == ["a b", "tab here", "caf?", "line end", "plain"]


def test_the_newest_replaces_the_older(tmp_path):
    features, which = clusters(5)
    for step in (3, 7, 7):
        project(tmp_path, features, [str(i) for i in which], np.zeros((5, 4, 4, 3), np.uint8), step)
    assert set(projections(tmp_path)) == {7}
    assert (tmp_path / "tensorboard" / "projector_config.pbtxt").read_text().count(
        "tensor_path"
    ) == 1


def test_none_and_damaged_ones(tmp_path):
    assert read_projection(tmp_path) is None
    features, which = clusters()
    project(tmp_path, features, [str(i) for i in which], np.zeros((40, 4, 4, 3), np.uint8))
    folder = tmp_path / "tensorboard" / "00007" / "features"
    whole = (folder / "tensors.tsv").read_text()
    for wrong in ("", whole[: len(whole) // 2], whole.replace("1", "x", 1), "nan\n" * 40):
        (folder / "tensors.tsv").write_text(wrong)
        with pytest.raises(UserError, match="damaged") as caught:
            read_projection(tmp_path)
        assert "\n" not in str(caught.value)
    (folder / "tensors.tsv").write_text(whole)
    sheet = (folder / "sprite.png").read_bytes()
    for wrong in (b"\x89PNG\r\n\x1a\n", sheet[:40], sheet[:33] + b"\xff" * 20 + sheet[53:]):
        (folder / "sprite.png").write_bytes(wrong)
        with pytest.raises(UserError, match="damaged"):
            read_projection(tmp_path)


def test_like_ones_lie_together_whatever_their_length():
    """Each point's nearest on the map is of its own cluster; lengths say nothing."""
    features, which = clusters(90)
    flat = flattened(features.astype(np.float64), seed=0)
    distance = np.linalg.norm(flat[:, None] - flat[None], axis=2) + np.eye(90) * 1e9
    assert (which[distance.argmin(1)] == which).mean() > 0.95
    scaled = features * np.linspace(1, 50, 90)[:, None]
    np.testing.assert_allclose(flattened(scaled.astype(np.float64), seed=0), flat, rtol=0.2, atol=2)
    np.testing.assert_array_equal(flattened(features.astype(np.float64), seed=0), flat)


@pytest.mark.parametrize(
    "features", [np.ones((1, 4)), np.ones((30, 4)), np.eye(3), np.ones((6, 1))]
)
def test_too_few_or_all_the_same(features):
    flat = flattened(features, seed=0)
    assert flat.shape == (len(features), 2)
    assert np.isfinite(flat).all()
