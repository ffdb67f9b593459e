"""Classes from the values of a column: numbers, names, booleans, and what is unknown."""

import math

import numpy as np
import pytest

from ssl_vit.data.classes import (
    NO_CLASS,
    NoClasses,
    class_of_each,
    classes_of,
    is_label_name,
    outcomes_of,
)


@pytest.mark.parametrize(
    ("values", "numbers", "classes"),
    [
        ([0, 2], [0, 2], ("0", "1", "2")),
        ([1.0, None, 0.0, math.nan, -1.0], [1, -1, 0, -1, -1], ("0", "1")),
        (["1.0", "2.0", "", "nan", "-1", "-1.0"], [0, 1, -1, -1, -1, -1], ("1", "2")),
        (["10", "9", "010"], [2, 0, 1], ("9", "010", "10")),
        (["dog", " cat ", None], [1, 0, -1], ("cat", "dog")),
        ([True, None, False], [1, -1, 0], ("False", "True")),
        ([b"dog", b"cat"], [1, 0], ("cat", "dog")),
        ([np.int64(1), np.float32(0)], [1, 0], ("0", "1")),
        ([10**9, 7], [1, 0], ("7", str(10**9))),
        ([1, "cat"], [0, 1], ("1", "cat")),
    ],
)
def test_values_become_classes(values, numbers, classes):
    found, names = classes_of(values)
    assert (found.tolist(), names, found.dtype) == (numbers, classes, np.int64)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0.5, 1.0], "holds numbers such as 0.5"),
        ([math.inf], "holds numbers such as inf"),
        ([None, -1, ""], "holds no label"),
        ([[0, 1]], "holds a list such as"),
        ([{NO_CLASS: "a text"}], "holds a text, which is no class"),
    ],
)
def test_values_that_are_no_classes(values, reason):
    with pytest.raises(NoClasses, match=reason):
        classes_of(values)


def test_names_that_never_recur_are_no_classes_unasked():
    values, once = ["a", "b", "c"], np.array([2, 0, -1, 1])
    with pytest.raises(NoClasses, match="another text for each image"):
        class_of_each(once, values)
    labels, classes = class_of_each(once, values, asked=True)
    assert (labels.tolist(), classes) == ([2, 0, -1, 1], ("a", "b", "c"))
    # Values that no image has make no class.
    labels, classes = class_of_each(np.array([2, 2, -1]), values)
    assert (labels.tolist(), classes) == ([0, 0, -1], ("c",))
    assert class_of_each(np.array([0, 1]), [7, 3])[0].tolist() == [7, 3]


def test_outcomes():
    found = outcomes_of(["1", "0.0", "", True, False, 1.0, -1, None, "true"])
    expected = np.array([1, 0, np.nan, 1, 0, 1, np.nan, np.nan, 1], dtype=np.float32)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(NoClasses, match="is 'yes'"):
        outcomes_of(["1", "yes"])


def test_names_of_label_columns():
    assert all(map(is_label_name, ("label", "Class", "y", "cls", "TARGET ")))
    assert not any(map(is_label_name, ("labeled_by", "species", "caption", "")))
