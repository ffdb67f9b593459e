"""What is read off a run's files: time, images, scores, pictures, and what is wrong with them."""

import json

import numpy as np
import pytest

from ssl_vit.reporting.story import read_scores, read_story
from tests.unit.run_folders import make_run, score, train_row, write_panel, write_results


def test_time_is_that_of_the_training_and_its_pauses(tmp_path):
    """A line's rate is of the steps since the one before; probes have none."""
    rows = [
        train_row(10, images_per_s=160.0),
        {"step": 10, "rankme": 5.0},
        train_row(30, images_per_s=320.0, saving_s=1.5, looking_s=2.5),
        {"step": 30, "process_s": [0.1, 0.2]},
        train_row(40, images_per_s=80.0, slowest_s=9.0, median_s=1.0),
        {"step": 40, "looking_s": 3.0},
    ]
    story = read_story(make_run(tmp_path / "run", rows))
    assert story.steps.tolist() == [10, 30, 40]
    np.testing.assert_allclose(story.seconds, [2.0, 2.0 + 2.0 + 4.0, 8.0 + 4.0 + 3.0])
    assert story.hours(20) == pytest.approx(5.0 / 3600)
    assert story.images == 40 * 32
    assert story.curve("rankme") == [
        {"step": 10, "images": 320, "hours": pytest.approx(2 / 3600), "value": 5.0}
    ]
    assert story.names == ["loss", "lr", "images_per_s", "waiting", "rankme"]
    assert story.total("saving_s") == 1.5
    assert story.total("energy_j") is None


def test_scores_of_every_result_file(tmp_path):
    folder = make_run(tmp_path / "run", [train_row(10)])
    write_results(folder, {"raw pixels": {"knn": score(40, 39, 41, "pixels")}})
    linear = {"evaluator": "linear", "encoder": {}, "scores": [score(60, 59, 61)]}
    (folder / "linear.json").write_text(json.dumps(linear))
    (folder / "other.json").write_text('{"what": "not ours"}')
    (folder / "list.json").write_text("[1, 2]")
    (folder / "broken.json").write_text('{"evaluator": "knn", "scores": [{"features": 1}]}')
    (folder / "torn.json").write_text('{"evaluator": "kn')
    nameless = {"evaluator": "knn", "scores": [score(None, 1, 2)]}
    (folder / "empty.json").write_text(json.dumps(nameless))
    ragged = {"evaluator": "knn", "scores": [score(60, 59, 61, confusion=[[1, 2], [3]])]}
    (folder / "ragged.json").write_text(json.dumps(ragged))
    unnamed = {"evaluator": "knn", "scores": [score(60, 59, 61, per_class=None)]}
    (folder / "unnamed.json").write_text(json.dumps(unnamed))
    (folder / "odd.json").write_text(json.dumps(nameless | {"evaluator": ["knn"]}))
    problems: list[str] = []
    found = read_scores(folder, problems)
    assert [(s.of, s.evaluator, s.score.top1) for s in found] == [
        ("raw pixels", "knn", 40),
        ("", "linear", 60),
    ]
    assert found[1].card == {"evaluator": "linear", "encoder": {}}
    assert len(problems) == 6
    for name in ("broken", "torn", "empty", "ragged", "unnamed", "odd"):
        assert any(name in problem for problem in problems)


def test_pictures_of_steps_that_were_undone_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run", [train_row(10), train_row(20)])
    for step in (10, 20, 30):
        write_panel(folder, "pca", step)
    (folder / "panels" / "pca" / "step-x.png").write_bytes(b"")
    assert sorted(read_story(folder).pictures["pca"]) == [10, 20]


def test_pictures_beside_results_are_of_the_encoder_as_it_is(tmp_path):
    folder = make_run(tmp_path / "run", [train_row(10)])
    result = {"evaluator": "segment", "encoder": {}, "scores": [score(60, 59, 61)]}
    (folder / "segment.json").write_text(json.dumps(result))
    (folder / "segment-boundaries.png").write_bytes(b"")
    (folder / "other-boundaries.png").write_bytes(b"")
    assert read_story(folder).pictures == {
        "segment-boundaries": {10: folder / "segment-boundaries.png"}
    }


def test_an_empty_folder_is_a_story_of_what_is_missing(tmp_path):
    story = read_story(tmp_path)
    assert (story.images, story.names, story.scores, story.pictures) == (None, [], [], {})
    assert any("metrics.jsonl" in problem for problem in story.problems)
    assert any("config.yaml" in problem for problem in story.problems)


def test_without_the_batch_there_are_steps_alone(tmp_path):
    """Neither a number of images nor a time is made up."""
    folder = make_run(tmp_path / "run", [train_row(10), train_row(20)], config="")
    (folder / "status.json").unlink()
    story = read_story(folder)
    assert story.images is None
    assert len(story.steps) == 0
    assert story.curve("loss") == [{"step": 10, "value": 1.0}, {"step": 20, "value": 1.0}]


def test_a_long_run_is_read_in_time_that_grows_with_it(tmp_path):
    """A hundred thousand points, each with its hours: as many as one by one."""
    rows = [train_row(10 * i, images_per_s=100.0 + i % 7) for i in range(1, 20_001)]
    story = read_story(make_run(tmp_path / "run", rows))
    points = story.curve("loss")
    assert len(points) == 20_000
    assert points[777]["hours"] == pytest.approx(float(story.hours(7780)))
