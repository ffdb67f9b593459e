"""A step benchmark against an earlier report: what has changed, and what may not be compared."""

import json

import pytest

from ssl_vit.benchmarks.baseline import changes, check_alike, read_baseline
from ssl_vit.benchmarks.speed_tables import _changes
from ssl_vit.common.errors import UserError


def report(rates=(10.0, 11.0, 12.0), memory=100, **more):
    """A report of step, as far as it is compared."""
    side = {"images_per_second": sorted(rates)[1], "images_per_second_of_repeats": list(rates)}
    return {
        "benchmark": "step",
        "method": "mae",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "a" * 40,
        "hardware": {"cpu": "A", "threads": 2, "gpu": None},
        "versions": {"torch": "1", "timm": "2"},
        "precision": "bfloat16",
        "sizes": {"batch_size": 8, "crops": [{"count": 1, "size": [224, 224]}]},
        "results": {"ours": {**side, "peak_memory_bytes": memory}},
        "options": {"out": "a.json", "run": {"compile": False}},
        **more,
    }


def test_what_has_changed_is_said_as_ratios():
    now = report((20.0, 22.0, 24.0), 50, commit="b" * 40, versions={"torch": "3", "timm": "2"})
    now["options"] = {"out": "b.json", "baseline": "a.json", "run": {"compile": True}}
    now["results"]["original"] = now["results"]["ours"]  # a peer that was not there
    found = changes(report(), now)
    ((name, ours),) = found["results"].items()
    assert (name, ours["ratio"], ours["memory_ratio"], ours["within_repeats"]) == (
        "ours",
        2,
        0.5,
        False,
    )
    assert found["differs"] == {
        "commit": ["a" * 40, "b" * 40],
        "torch": ["1", "3"],
        "run.compile": [False, True],
    }
    table = _changes({**now, "baseline": found})
    assert table.rows[0] == ("ours", "11.0", "22.0", "2.00 x", "", "0.50 x")
    assert ("run.compile", "False", "True", "", "", "") in table.rows


def test_repeats_that_overlap_may_be_chance_and_unknown_memory_has_no_ratio():
    found = changes(report(memory=None), report((12.0, 13.0, 14.0)))
    assert found["results"]["ours"]["within_repeats"]
    assert found["results"]["ours"]["memory_ratio"] is None
    assert found["differs"] == {}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"hardware": {"cpu": "B", "threads": 2, "gpu": None}}, "with other cpu A (now B);"),
        ({"hardware": {"cpu": "A", "threads": 1, "gpu": None}}, "with other threads 2 (now 1);"),
        ({"precision": "float32"}, "precision bfloat16 (now float32)"),
        ({"sizes": {"batch_size": 9, "crops": []}}, "sizes.batch_size 8 (now 9)"),
    ],
)
def test_another_machine_precision_or_size_is_refused(other, said):
    with pytest.raises(UserError) as refused:
        check_alike("a.json", report(), report(**other))
    assert said in str(refused.value)
    check_alike("a.json", report(), report(versions={}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "no report of step"),
        (json.dumps(report() | {"benchmark": "loader"}), "no report of step"),
        (json.dumps(report() | {"results": {"ours": 3}}), "no report of step"),
        (json.dumps(report() | {"results": {"ours": {"images_per_second": "x"}}}), "no report"),
        (json.dumps(report() | {"method": "dino"}), "a report of 'dino', not of 'mae'"),
    ],
)
def test_what_is_no_baseline_is_refused_in_a_line(text, said, tmp_path):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_baseline(str(path), "mae")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_report_is_read_back(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(report()))
    assert read_baseline(str(tmp_path / "a.json"), "mae") == report()
