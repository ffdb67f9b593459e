"""Principal components of patch features, their foreground, and the picture of them."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from ssl_vit.common.errors import UserError
from ssl_vit.pictures.patch_pca import fit_pca, foreground, pca_panel


def random_patches(shape=(3, 20, 12), seed=0):
    """Features whose directions have very different variances, around a mean far from zero."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1, -1, shape[-1])
    mixed = torch.randn(shape, generator=generator) * scales
    turn = torch.linalg.qr(torch.randn(shape[-1], shape[-1], generator=generator))[0]
    return mixed @ turn + 5


def test_as_sklearn():
    patches = random_patches()
    pca = fit_pca(patches)
    theirs = PCA(3, svd_solver="full").fit(patches.flatten(0, 1).double().numpy())
    np.testing.assert_allclose(pca.explained.numpy(), theirs.explained_variance_ratio_, rtol=1e-10)
    np.testing.assert_allclose(pca.mean.numpy(), theirs.mean_, rtol=1e-12)
    alike = np.abs((pca.components.numpy() * theirs.components_).sum(1))
    np.testing.assert_allclose(alike, 1, rtol=1e-10)
    expected = theirs.transform(patches[1].double().numpy())
    np.testing.assert_allclose(pca.project(patches)[1].abs().numpy(), np.abs(expected), atol=1e-9)
    assert pca.explained.sum() < 1
    assert fit_pca(patches, 12).explained.sum() == pytest.approx(1)


@pytest.mark.parametrize("shape", [(3, 20, 12), (1, 2, 12), (1, 1, 5), (2, 30, 2), (4, 5, 1)])
def test_orthonormal_and_finite(shape):
    """Of few patches, one patch, and fewer features than components too."""
    pca = fit_pca(random_patches(shape))
    k = min(3, shape[-1])
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(k).double())
    assert pca.explained.shape == (k,)
    assert 0 <= pca.explained.sum() <= 1 + 1e-12
    assert pca.explained.sort(descending=True)[0].equal(pca.explained)


def test_signs_do_not_depend_on_those_of_the_features_order():
    patches = random_patches()
    pca, again = fit_pca(patches), fit_pca(patches.flip(0, 1))
    torch.testing.assert_close(pca.components, again.components)
    largest = pca.components.gather(1, pca.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_constant_features(value):
    patches = torch.full((2, 9, 7), value)
    pca = fit_pca(patches)
    assert pca.explained.tolist() == [0, 0, 0]
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(3).double())
    picture = pca_panel(np.zeros((2, 24, 24, 3), np.uint8), patches, (3, 3))
    assert picture.dtype == np.uint8


@pytest.mark.parametrize("bad", [torch.full((1, 4, 3), torch.nan), torch.zeros(1, 0, 3)])
def test_refusals(bad):
    with pytest.raises(UserError, match=r"not finite|no patches"):
        fit_pca(bad)


@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_what_touches_the_borders_less(sign):
    """A square in the middle of one image, at a border of another; whatever the sign."""
    thing = torch.zeros(2, 5, 7, dtype=torch.bool)
    thing[0, 1:4, 2:5] = True
    thing[1, 2:5, 3:5] = True  # down to the lower border
    first = torch.where(thing, 2.0, -1.0).flatten(1) * sign
    kept, side = foreground(first, (5, 7))
    assert side == sign
    assert kept.equal(thing.flatten(1))


def test_foreground_where_all_is_border():
    first = torch.tensor([[1.0, -1.0, 2.0, -2.0]])
    kept, side = foreground(first, (2, 2))
    assert (kept.tolist(), side) == ([[True, False, True, False]], 1)


def test_panel_of_a_thing_before_a_ground():
    """Same parts of two images have the same colour; what is no foreground is dark."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.zeros(2, 6, 6, dtype=torch.long)
    parts[0, 1:4, 1:3], parts[0, 1:4, 3:5] = 1, 2  # a left and a right half
    parts[1, 2:5, 3:5], parts[1, 2:5, 1:3] = 1, 2  # the other way round
    kinds = torch.tensor([[0.0] * 8, [9.0, 9, 9, 9, 2, 0, 0, 0], [9.0, 9, 9, 9, 0, 2, 0, 0]])
    patches = kinds[parts.flatten(1)] + 0.01 * torch.randn(2, 36, 8, generator=generator)
    images = np.full((2, 96, 96, 3), 200, np.uint8)
    picture = pca_panel(images, patches, (6, 6))
    assert picture.shape[1] == 4 * 100 + 4

    def cells(column):
        rows = [picture[16 + 100 * row :, 4 + 100 * column :][:96, :96] for row in (0, 1)]
        return np.stack(rows)[:, 8::16, 8::16].astype(int)

    assert (cells(0) == 200).all()
    ground, shown = (parts == 0).numpy(), cells(3)
    assert (shown[ground] == 36).all()  # dark gray
    halves = [shown[(parts == part).numpy()] for part in (1, 2)]
    assert all(np.ptp(half[:, 0]) < 30 for half in halves)
    assert abs(halves[0][:, 0].mean() - halves[1][:, 0].mean()) > 150
    light = cells(2).sum(-1)
    assert light[~ground].min() > light[ground].max()


def test_an_outlier_does_not_dim_the_others():
    """In the map of the very component along which it lies."""
    patches = random_patches((4, 100, 6))
    images = np.zeros((4, 100, 100, 3), np.uint8)
    maps = (slice(16 + 104, 4 * 104), slice(4 + 2 * 104, 4 + 2 * 104 + 100))
    plain = pca_panel(images, patches, (10, 10))[maps].std()
    patches[0, 0] += 1e4 * fit_pca(patches).components[0].float()
    assert pca_panel(images, patches, (10, 10))[maps].std() > 0.7 * plain
