"""What is drawn of the detections in an image."""

import torch

from ssl_vit.data.jitter import fitted
from ssl_vit.evaluators.detect import Found
from ssl_vit.evaluators.detect_pictures import _guess


def test_only_the_likeliest_are_drawn():
    """As many as are asked for, the best first, and none that is hardly likely."""
    corners = torch.arange(6.0)
    boxes = torch.stack([corners, corners, corners + 10, corners + 10], dim=1)
    scores = torch.tensor([0.95, 0.9, 0.8, 0.5, 0.4, 0.1])
    found = Found(0, boxes, scores, torch.zeros(6, dtype=torch.int64))
    at = fitted((64, 64), (64, 64))
    drawn = {most: _guess(found, ["cell"], at, most) for most in (2, 9)}
    assert drawn[2].texts == ["cell 95", "cell 90"]
    torch.testing.assert_close(drawn[2].boxes, boxes[:2])
    assert [text[-2:] for text in drawn[9].texts] == ["95", "90", "80", "50", "40"]
