"""Compiled blocks, by the device's own compiler of kernels, which CPU tests leave out."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.gpu.conftest import surroundings

METHODS = ("mae", "dino")


def test_compiled_steps_are_the_eager_ones(device, say):
    """With stochastic depth, of all sizes of crops; and none after the second compiles."""
    command = [sys.executable, "-m", "tests.gpu.compiled_steps", str(device), *METHODS]
    done = subprocess.run(command, cwd=ROOT, env=surroundings(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        early, late = row["graphs"]
        say(f"{row['method']}: {late} compiled graphs")
        assert 0 < early == late
        assert row["compiled"] == pytest.approx(row["eager"], rel=1e-4)
