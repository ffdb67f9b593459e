"""Each thing that can go wrong is told, by its number, and a sound run is left in peace."""

import pytest

from ssl_vit.reporting.advice import advise
from ssl_vit.reporting.story import read_story
from tests.unit.run_folders import CONFIG, make_run, score, train_row, write_results

SOUND = [train_row(10 * i, loss=1.0 - 0.02 * i, skipped=0.0) for i in range(1, 21)]
LOOK = {"step": 200, "feature_std": 0.6, "rankme": 40.0, "knn20_mean": 50.0}

LOOKS = [LOOK | {"step": s, "knn20_mean": k} for s, k in ((10, 40.0), (100, 52.0), (200, 49.0))]


def told(folder):
    return [(a.text, f"{a.remedy} {a.command}", a.serious) for a in advise(read_story(folder))]


def test_nothing_is_said_of_a_sound_run(tmp_path):
    folder = make_run(tmp_path / "run", [*SOUND, LOOK])
    best, chance = score(60, 59, 61), score(30, 29, 31)
    write_results(
        folder,
        {
            "raw pixels": {
                "knn": score(45, 44, 46, "pixels"),
                "linear": score(40, 39, 41, "pixels"),
            },
            "random encoder": {"knn": chance, "linear": chance},
            "mae encoder": {"knn": best, "linear": best},
        },
    )
    assert told(folder) == []


@pytest.mark.parametrize(
    ("rows", "status", "text", "remedy", "serious"),
    [
        (SOUND, {"state": "failed", "reason": "disk full", "total": 300},
         "The run is failed at step 200 of 300: ", "--config", True),
        (SOUND, {"state": "stopped", "total": 300}, "The run is stopped at step 200 of 300",
         "python -m ssl_vit.pretrain mae --config", False),
        ([*SOUND, {"step": 200, "warning": "step 200: the teacher's output is uniform"}], {},
         "Warning at step 200: the teacher's output is uniform", "", True),
        ([*SOUND[:-1], train_row(200, loss=0.5, skipped=0.4)], {},
         "4 of 200 steps were skipped", "--optim.clip 1", True),
        ([*SOUND, LOOK | {"feature_std": 0.05}], {}, "Feature spread is 0.05", "warm-up", True),
        ([*SOUND, LOOK | {"rankme": 1.4}], {}, "Effective rank is 1.4", "warm-up", True),
        ([*SOUND, *LOOKS], {}, "k-NN was best at step 100 (52.0 %) and is 49.0 % now",
         "--run.keep-every", True),
        ([r | {"loss": 1.0} for r in SOUND], {}, "The loss does not fall: 1 in the first fifth",
         "--optim.lr", True),
        ([r | {"waiting": 0.5} for r in SOUND], {}, "50 % of the time went by waiting for images",
         "--data.workers", False),
        ([r | {"slowest_s": 3.0, "median_s": 1.0} for r in SOUND], {},
         "The slowest process takes 3.0 times the median", "machine", False),
        ([r | {"looking_s": 3.0} for r in SOUND], {},
         "48 % of the time went into probing the encoder", "--run.probe-every", False),
        ([r | {"saving_s": 1.0} for r in SOUND], {}, "24 % of the time went into saving",
         "--run.save-every", False),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(tmp_path, rows, status, text, remedy, serious):
    found = told(make_run(tmp_path / "run", rows, status))
    assert len(found) == 1, found
    assert found[0][0].startswith(text)
    assert remedy in found[0][1]
    assert found[0][2] == serious


@pytest.mark.parametrize(
    ("rival", "whose", "serious"),
    [("raw pixels", "raw pixels", False), ("random encoder", "an untrained encoder", True)],
)
def test_an_encoder_worse_than_none(tmp_path, rival, whose, serious):
    """Beyond the intervals only: what chance may have done is no finding."""
    folder = make_run(tmp_path / "run", [*SOUND, LOOK])
    write_results(
        folder, {rival: {"knn": score(50, 49, 51)}, "mae encoder": {"knn": score(45, 44, 46)}}
    )
    (found,) = told(folder)
    assert found[0] == f"k-NN: 45.0 %, below the 50.0 % of {whose}"
    assert found[2] == serious
    write_results(
        folder, {rival: {"knn": score(50, 45, 55)}, "mae encoder": {"knn": score(47, 44, 50)}}
    )
    assert told(folder) == []


def test_a_warning_is_told_once_and_mildly_when_it_is_over(tmp_path):
    lines = [(50, "step 50: flat by 1.5"), (90, "step 90: flat by 1.7")]
    rows = sorted([*SOUND, *({"step": s, "warning": w} for s, w in lines)], key=lambda r: r["step"])
    assert told(make_run(tmp_path / "on", rows)) == [("Warning at step 50: flat by 1.5", " ", True)]
    rows.append({"step": 200, "warning": "step 200: no longer: flat"})
    assert told(make_run(tmp_path / "over", rows)) == [
        ("Warning at step 50: flat by 1.5", " ", False),
        ("Warning at step 200: no longer: flat", " ", False),
    ]


def test_many_warnings_are_a_few_lines(tmp_path):
    rows = [*SOUND, *({"step": 200, "warning": "x" * i} for i in range(1, 40))]
    found = told(make_run(tmp_path / "run", rows))
    assert len(found) == 9
    assert "31 more warnings are in metrics.jsonl" in [text for text, _, _ in found]


@pytest.mark.parametrize(("images", "lines"), [(2.0, 0), (400.0, 1)])
def test_of_few_images_their_spread_says_nothing(tmp_path, images, lines):
    look = LOOK | {"rankme": 2.0, "held_out_images": images}
    assert len(told(make_run(tmp_path / "run", [*SOUND, look]))) == lines


def test_a_run_that_begins_with_given_weights_need_not_fall(tmp_path):
    rows = [row | {"loss": 1.0} for row in SOUND]
    config = CONFIG + "init: {encoder: other.pth}\n"
    assert told(make_run(tmp_path / "run", rows, config=config)) == []
