"""Quality per minute: the arithmetic of the budget, the table, and mistakes in one line."""

import pytest

from ssl_vit.benchmark import main
from ssl_vit.benchmarks.quality import (
    HEADER,
    curve,
    fitted_steps,
    intervals,
    markdown,
    minutes_at,
    rate_after,
)
from ssl_vit.commands import quality
from ssl_vit.commands.quality import Results
from ssl_vit.commands.quality_options import last_value, parse_options, split_flags
from ssl_vit.commands.quality_peers import PeerRun
from ssl_vit.common.errors import UserError

# Batches of 64: ten slow steps in 20 s, then ten a second; a probe between them, and a warning.
ROWS = [
    {"step": 10, "images_per_s": 32.0},
    {"step": 10, "knn20_cls": 30.0, "knn20_mean": 31.0},
    {"step": 20, "images_per_s": 640.0},
    {"step": 25, "warning": "the teacher's output has collapsed"},
    {"step": 25, "knn20_cls": 40.0, "knn20_mean": 41.0},
    {"step": 40, "images_per_s": 640.0, "looking_s": 100.0},
]
SCORE = {"value": 50.0, "interval": [45.0, 55.0], "features": "mean", "setting": "k=20"}
DATA = ("--data.train", "digits:train", "--data.val", "digits:val")


def test_a_row_takes_as_long_as_its_rate_says():
    assert intervals(ROWS, 64) == [(0, 10, 20.0), (10, 20, 1.0), (20, 40, 2.0)]


@pytest.mark.parametrize(("warm_up", "rate", "seconds"), [(0, 40 * 64 / 23, 23), (1, 640, 3)])
def test_steps_of_the_warm_up_do_not_count_for_the_rate(warm_up, rate, seconds):
    assert rate_after(ROWS, 64, warm_up) == pytest.approx((rate, seconds))


def test_no_rate_is_known_before_the_warm_up_is_over():
    assert rate_after(ROWS, 64, 21) is None
    assert rate_after([], 64, 0) is None


@pytest.mark.parametrize(
    ("rate", "batch", "minutes", "steps"),
    [(640.0, 64, 1.0, 600), (640.0, 64, 0.1, 60), (1.0, 64, 0.1, 1), (100.0, 64, 10.0, 938)],
)
def test_steps_fill_the_minutes(rate, batch, minutes, steps):
    assert fitted_steps(rate, batch, minutes) == steps


def test_the_start_is_not_counted_and_probes_are_not():
    """Ten steps a second: the first ten steps count as the next ones."""
    assert minutes_at(ROWS, 64) == [
        (0, 0.0),
        (10, pytest.approx(1 / 60)),
        (20, pytest.approx(2 / 60)),
        (40, pytest.approx(4 / 60)),
    ]
    assert minutes_at(ROWS[:1], 64)[-1] == (10, pytest.approx(20 / 60))


def test_a_curve_is_of_one_feature_by_minutes():
    found = curve(ROWS, "cls", minutes_at(ROWS, 64))
    assert found == [(pytest.approx(1 / 60), 30.0), (pytest.approx(2.5 / 60), 40.0)]


def judged(value: float, seed: int = 0) -> dict:
    score = {"value": value, "interval": [value - 2, value + 4]}
    numbers = {"images_per_second": 640.0, "images_seen": 38400, "minutes": 1.002}
    return {
        "recipe": "a_b",
        "method": "a",
        "seed": seed,
        **numbers,
        "scores": {"knn": score, "linear": score},
    }


def test_the_table_has_mean_and_spread_over_seeds():
    report = {
        "asked": {"minutes": 1.0, "train": "kept:x", "val": "held:x", "machine": "a CPU"},
        "date": "2026-11-29T10:00:00",
        "versions": {"torch": "2"},
        "commit": None,
        "runs": {"one": judged(50.0), "two": judged(51.0, 1), "begun": {"recipe": "c_d"}},
        "baselines": {"raw pixels": {"scores": judged(40.0)["scores"]}},
    }
    lines = markdown(report).splitlines()
    assert lines[0] == "1 minutes of training each; 2026-11-29, a CPU, torch 2."
    assert [word.strip() for word in lines[2].strip("| ").split(" | ")] == list(HEADER)
    cell = "50.5 ±3.0, sd 0.7"
    assert lines[4] == f"| a | a_b, 2 seeds | 640 | 38,400 | 1 | {cell} | {cell} |"
    assert lines[5].startswith("| raw pixels |")
    assert "`held:x`" in lines[-2] + lines[-3] + lines[-4]


# --- options ------------------------------------------------------------------------------------


def test_options_with_a_dot_are_those_of_pretraining():
    argv = ["--minutes", "3", "--encoder.image-size", "64", "32", "--seeds=2", "--data.train=a"]
    own, passed = split_flags(argv)
    assert own == ["--minutes", "3", "--seeds=2"]
    assert passed == ["--encoder.image-size", "64", "32", "--data.train=a"]


def test_the_last_value_of_an_option_counts():
    flags = ["--data.train", "a", "--data.val", "b", "--data.train=c"]
    assert [last_value(flags, f"--data.{name}") for name in ("train", "val", "labels")] == [
        "c",
        "b",
        "",
    ]


def test_every_method_with_a_recipe_for_the_data_is_compared():
    plan = parse_options(DATA)
    names = [entry.name for entry in plan.entries]
    assert len(names) >= 5
    assert names == [f"{entry.method}_digits" for entry in plan.entries]
    assert "distill_digits" not in names  # its teacher is not there
    assert (plan.data.train, plan.data.val) == ("digits:train", "digits:val")


def test_options_reach_every_recipe():
    plan = parse_options(["--methods", "mae,dino_digits", *DATA, "--optim.batch-size", "48"])
    assert [entry.name for entry in plan.entries] == ["mae_digits", "dino_digits"]
    assert {entry.options.optim.batch_size for entry in plan.entries} == {48}
    assert plan.flags == [*DATA, "--optim.batch-size", "48"]


def test_a_search_never_names_the_validation_set():
    plan = parse_options(["--split", "search", "--methods", "mae", *DATA])
    assert (plan.data.train, plan.data.val) == ("kept:digits:train", "held:digits:train")
    images = plan.entries[0].options.data
    assert (images.train, images.val) == ("kept:digits:train", "held:digits:train")
    assert last_value(plan.flags, "--data.val") == "held:digits:train"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "0", *DATA], "--minutes is 0; it must be above 0"),
        (["--minutes", "-1", *DATA], "--minutes is -1; it must be above 0"),
        (["--seeds", "0", *DATA], "--seeds is 0; it must be 1 or more"),
        ([], "--data.train is missing"),
        (DATA[:2], "--data.val is missing; or give --split search"),
        (DATA[2:], "--data.train is missing"),
        (["--methods", "meo", *DATA], "no method, recipe or file of that name (nearest known: mae"),
        (["--methods", "finetune_cifar10", *DATA], "its name must begin with a method"),
        (["--methods", "distill", *DATA], "runs/mae-digits"),
        (
            ["--methods", "mae", "--data.train", "folder:x", "--data.val", "y"],
            "no recipe of it fits",
        ),
        (["--data.train", "folder:mine", "--data.val", "folder:x"], "give --methods with recipes"),
        ([*DATA, "--run.length", "3ep"], "--run.length is '3ep'; here it follows from --minutes"),
        ([*DATA, "--optim.batchsize", "3"], "unknown option '--optim.batchsize'"),
        ([*DATA, "--looked", "3"], "unknown option '--looked'"),
        (["--methods", "mae", "--data.train", "digits:train", "--data.val", "nix:x"], "'nix:x'"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        main(["quality", *arguments])
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_results_of_other_minutes_are_not_mixed(tmp_path):
    out = ["--methods", "mae", *DATA, "--out", str(tmp_path)]
    Results(parse_options([*out, "--minutes", "3"])).write()
    Results(parse_options([*out, "--minutes", "3", "--seeds", "2"]))
    with pytest.raises(UserError, match=r"its results are of minutes 3.0, not 4.0; give another"):
        Results(parse_options([*out, "--minutes", "4"]))


def test_what_is_trained_is_only_judged(tmp_path, monkeypatch):
    """Its minutes are in the report, which is written before it is judged."""
    monkeypatch.setattr(quality, "score_encoder", lambda *_: {"knn": SCORE, "linear": SCORE})
    plan = parse_options([*DATA, "--methods", "mae_digits", "--out", str(tmp_path / "q")])
    side = PeerRun(plan, plan.entries[0], 0, "original")
    side.file.parent.mkdir(parents=True)
    side.file.touch()
    monkeypatch.delattr(PeerRun, "train")
    results = Results(plan)
    run = {"planned": {"minutes": 1.0, "images_per_second": 64.0, "steps": 3}, "minutes": 0.5}
    results.report["runs"][side.label] = side.about() | run
    quality.run_one(plan, side, results)
    found = results.report["runs"][side.label]
    batch = plan.entries[0].options.optim.batch_size
    assert found["images_per_second"] == pytest.approx(3 * batch / 30)
    assert found["scores"]["knn"] == SCORE
