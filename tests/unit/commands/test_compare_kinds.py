"""A table of encoders is of one kind of images, which is checked before any work."""

import pytest

from ssl_vit.commands.compare_options import parse_options
from ssl_vit.common.errors import UserError


def options(evaluators: str, train: str) -> list[str]:
    sets = ["--data.train", train, "--data.val", train, "--recipe", "some.yaml"]
    return ["--encoders", "a", "--evaluators", *evaluators.split(), *sets]


@pytest.mark.parametrize(
    ("evaluators", "train"),
    [
        ("knn linear finetune", "folder:a"),
        ("segment finetune", "pairs:a"),
        ("depth", "kept:depth:a"),
        ("detect", "coco:a"),
    ],
)
def test_evaluators_of_one_kind_stand_together(evaluators, train):
    assert parse_options(options(evaluators, train)).evaluators == tuple(evaluators.split())


@pytest.mark.parametrize(
    ("evaluators", "train", "said"),
    [
        ("segment depth", "pairs:a", "has depth, which needs images named as depth:...; --data.tr"),
        ("knn", "pairs:a", "has knn, which needs images with classes; --data.train is 'pairs:a'"),
        ("detect", "folder:a", "has detect, which needs images named as coco:...; --data.train is"),
    ],
)
def test_others_are_refused(evaluators, train, said):
    with pytest.raises(UserError) as error:
        parse_options(options(evaluators, train))
    assert said in str(error.value)
    assert str(error.value).endswith("one kind of images a table")
