"""Similarities of patches with marked ones: which are marked, and the picture."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ssl_vit.common.errors import UserError
from ssl_vit.common.figures import heat
from ssl_vit.pictures.similarity import marked_patches, similarity_panel


def three_parts() -> torch.Tensor:
    """(2, 12, 3) features of 3 x 4 patches: most of one kind, two of a second, one of a third; in
    the second image the kinds are elsewhere."""
    kinds = torch.tensor(
        [[0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 2], [2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    )
    directions = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [-0.5, 0, 0.75**0.5]])
    return directions[kinds] * 7


def test_marks_are_of_parts_that_differ():
    unit = F.normalize(three_parts().double(), dim=-1)
    assert marked_patches(unit @ unit.mT).tolist() == [[0, 11, 5], [3, 0, 1]]


@pytest.mark.parametrize("patches", [1, 2, 5])
def test_no_patch_is_marked_twice(patches):
    """Of few patches, all alike."""
    found = marked_patches(torch.ones(2, patches, patches))
    assert found.shape == (2, min(3, patches))
    assert all(len(set(row)) == len(row) for row in found.tolist())


def test_the_picture_is_of_the_similarities():
    """The middle of each square is the heat of its cosine, from the least of the map to 1."""
    images = np.full((2, 96, 128, 3), 90, np.uint8)
    picture = similarity_panel(images, three_parts(), (3, 4))
    row = picture[[i for i in range(len(picture)) if (picture[i] == 90).all(-1).sum() > 60]]
    assert len(row) >= 2 * 90
    of_second = picture[:, 4 + 3 * 132 : 4 + 3 * 132 + 128]  # the map of the third mark
    unit = F.normalize(three_parts()[0].double(), dim=-1)
    own = unit @ unit[5]
    scaled = ((own - own.min()) / (1 - own.min())).numpy()
    top = int(np.flatnonzero((picture[:, 4:132] == 90).all(-1).any(1))[0])
    middles = of_second[top + 16 : top + 96 : 32, 16::32].reshape(-1, 3)
    np.testing.assert_array_equal(middles, heat(scaled))
    framed = of_second[top + 32 : top + 64, 32:64]  # patch 5
    assert (framed[:2] == 255).all()
    assert (framed[2:30, 2:30] != 255).any(-1).all()


def test_what_is_not_finite_is_refused():
    with pytest.raises(UserError, match="not finite"):
        similarity_panel(np.zeros((1, 8, 8, 3), np.uint8), torch.full((1, 4, 2), torch.nan), (2, 2))
