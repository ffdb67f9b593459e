"""What a door imports before it has read its options: seen in a fresh process, by its modules."""

import json
import pkgutil
import subprocess
import sys

from ssl_vit import options
from ssl_vit.methods import method_names
from tests.unit.run_folders import (
    make_run,
    score,
    train_row,
    write_panel,
    write_projection,
    write_results,
)

# Each takes longer to import than all that reading options needs.
HEAVY = (
    *("torch", "timm", "torchvision", "tensorboard", "sklearn", "scipy", "matplotlib", "pandas"),
    *("altair", "datasets", "transformers", "onnx", "numpy.random", "einops"),
)
PROBES = (
    *("knn", "linear", "attentive", "retrieval", "copies", "segment", "depth", "finetune"),
    *("detect", "compare"),
)
PICTURES = ("attention", "reconstruction", "pca", "similarity", "neighbours")
# The methods that say their options apart from what trains.
APART = [m.name for m in pkgutil.iter_modules(options.__path__) if m.name != "base"]
CALLS = [
    ["runs", "."],
    ["runs", "nowhere"],
    ["report", "--help"],
    ["report", "nowhere"],
    ["launch.slurm", "--help"],
    ["launch.slurm", "--nods", "1", "--", "pretrain", "mae"],
    ["export", "--help"],
    ["export", "--to", "tim"],
    ["export"],
    ["embed", "--help"],
    ["embed", "--out", "x.txt"],
    ["pretrain", "--help"],
    ["pretrain", "mea"],
    *(["pretrain", name, "--help"] for name in APART),
    *(["pretrain", name, "--optim.lr", "x"] for name in APART),
    ["pretrain", "mae", "--config", "mae_vit_b16", "--method.mask-ratio", "2"],
    *(["evaluate", name, "--help"] for name in PROBES),
    *(["evaluate", name, "--data.train"] for name in PROBES),
    ["evaluate", "again"],
    *(["visualize", name, "--help"] for name in PICTURES),
    ["visualize", "pca", "--count", "0"],
    *(["benchmark", name, "dino", "--help"] for name in ("step", "loader", "end-to-end", "scale")),
    ["benchmark", "step", "mae", "--repeats", "0"],
    ["benchmark", "detection", "--help"],
    ["benchmark", "detection", "--sizes", "8"],
    ["benchmark", "quality", "--help"],
    ["benchmark", "quality", "--minutes", "0"],
    ["benchmark", "device", "--help"],
    ["benchmark", "device", "--minutes", "0"],
]
SCRIPT = """
import contextlib, importlib, io, json, sys
from ssl_vit.common.errors import UserError

calls, heavy = json.load(sys.stdin)
for door, *argv in calls:
    module = importlib.import_module(door if "." in door else f"ssl_vit.{door}")
    ended = "returned"
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            module.main(argv)
        except (SystemExit, UserError) as error:
            ended = type(error).__name__
    print(json.dumps([door, *argv, ended, [name for name in heavy if name in sys.modules]]))
"""


# What makes a run, and no report on it. Its charts and its map take altair and scikit-learn.
TRAINING = (
    *("torch", "timm", "torchvision", "tensorboard", "matplotlib", "einops", "datasets"),
    *("transformers", "onnx", "ssl_vit.training.loop"),
)


def called(calls, heavy, folder):
    """Each call with how it ended and what it has imported of ``heavy``, in one process."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([calls, heavy]),
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_options_are_read_before_anything_heavy_is_imported(tmp_path):
    """Of every door: its help, its mistakes, and the table of runs."""
    make_run(tmp_path / "one", [train_row(10), train_row(20)])
    ends = [
        "returned" if c == ["runs", "."] else "SystemExit" if "--help" in c else "UserError"
        for c in CALLS
    ]
    expected = [[*call, end, []] for call, end in zip(CALLS, ends, strict=True)]
    assert called(CALLS, HEAVY, tmp_path) == expected


def test_a_report_needs_nothing_that_trains(tmp_path):
    """Of one run with all that there may be in it, of one of every method, and of a fine-tuning."""
    rows = [train_row(10, knn20_mean=50.0), train_row(20, knn20_mean=60.0)]
    whole = make_run(tmp_path / "whole", rows)
    scores = {name: {"linear": score(50, 40, 60)} for name in ("raw pixels", "mae encoder")}
    write_results(whole, scores)
    write_panel(whole, "reconstruction", 10)
    write_projection(whole, 20)
    names = [*method_names(), "finetune"]
    for name in names:
        make_run(tmp_path / name, rows, {"name": name})
    calls = [["report", "whole"], ["report", *names], ["report", "mae", "--out", "own.html"]]
    expected = [[*call, "returned", []] for call in calls]
    assert called(calls, TRAINING, tmp_path) == expected
    assert "data:image/" in (tmp_path / "whole" / "report.html").read_text()
