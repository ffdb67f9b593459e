"""What a door imports before it has read its options: seen in a fresh process, by its modules."""

import json
import subprocess
import sys

from ssl_vit.methods import method_names
from tests.unit.run_folders import make_run, train_row

# Each takes longer to import than all that reading options needs.
HEAVY = (
    *("torch", "timm", "torchvision", "tensorboard", "sklearn", "scipy", "matplotlib", "pandas"),
    *("altair", "datasets", "transformers", "onnx", "numpy.random", "einops"),
)
PROBES = ("knn", "linear", "attentive", "retrieval", "copies", "segment", "finetune", "compare")
PICTURES = ("attention", "reconstruction", "pca", "similarity", "neighbours")
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
    *(["pretrain", name, "--help"] for name in method_names()),
    *(["pretrain", name, "--optim.lr", "x"] for name in method_names()),
    ["pretrain", "mae", "--config", "mae_vit_b16", "--method.mask-ratio", "2"],
    *(["evaluate", name, "--help"] for name in PROBES),
    *(["evaluate", name, "--data.train"] for name in PROBES),
    ["evaluate", "again"],
    *(["visualize", name, "--help"] for name in PICTURES),
    ["visualize", "pca", "--count", "0"],
    *(["benchmark", name, "dino", "--help"] for name in ("step", "loader", "end-to-end", "scale")),
    ["benchmark", "step", "mae", "--repeats", "0"],
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


def test_options_are_read_before_anything_heavy_is_imported(tmp_path):
    """Of every door: its help, its mistakes, and the table of runs."""
    make_run(tmp_path / "one", [train_row(10), train_row(20)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([CALLS, HEAVY]),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    ends = [
        "returned" if c == ["runs", "."] else "SystemExit" if "--help" in c else "UserError"
        for c in CALLS
    ]
    assert found == [[*call, end, []] for call, end in zip(CALLS, ends, strict=True)]
