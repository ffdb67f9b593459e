"""The example of docs/methods.md is a whole method: it trains, goes on to the same bits, and keeps
the contract that every method has."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ssl_vit import methods
from ssl_vit.evaluators.linear import LinearProtocol
from ssl_vit.methods import method_names
from ssl_vit.pretrain import main
from tests.conftest import ROOT

SMALL = (
    *("--data.train", "digits:train", "--data.val", "digits:val", "--data.channels", "1"),
    *("--encoder.arch", "vit_tiny_patch16_224", "--encoder.image-size", "16"),
    *("--encoder.patch-size", "4", "--encoder.width", "32", "--encoder.depth", "1"),
    *("--encoder.heads", "2", "--method.width", "16", "--optim.batch-size", "64"),
    *("--run.save-every", "4st", "--run.probe-every", "1000ep", "--run.probe-images", "40"),
    *("--run.length", "8st", "--optim.warmup", "2st", "--data.workers", "0"),
)


# The cheap files of the contract: no run from its first step to its last.
CONTRACT = ("test_description.py", "test_encoder.py", "test_options.py", "test_presets.py")
RECIPE = "data: {train: digits:train, val: digits:val, channels: 1}\n"


def write_example(folder: Path) -> None:
    """The example's file, as it stands on the page."""
    page = (ROOT / "docs" / "methods.md").read_text()
    code = re.search(r"<!-- example:method -->\n```python\n(.*?)```", page, re.DOTALL)[1]
    assert len(code.splitlines()) <= 60
    (folder / "simsiam.py").write_text(code)


@pytest.fixture
def name(tmp_path, monkeypatch):
    """The method of the example, beside the package's own."""
    write_example(tmp_path)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert "simsiam" in method_names()
    return "simsiam"


def weights(folder):
    return load_file(folder / "checkpoints" / "step-00000008" / "task.safetensors")


def test_the_example_trains_and_resumes(name, tmp_path, capsys, caplog, monkeypatch):
    """The whole run, and its second half anew, as if it had been killed before the end."""
    monkeypatch.setattr(LinearProtocol, "steps", lambda self, n: 20)  # of the scores at the end
    run = [name, *SMALL, "--run.out", str(tmp_path / "run"), "--run.keep", "5"]
    assert main(run) == 0
    assert "simsiam encoder" in capsys.readouterr().out
    whole = weights(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "step-00000008"
    assert (last.parent / "step-00000004").is_dir()
    last.rename(tmp_path / "gone")
    caplog.set_level("INFO", "ssl_vit")
    assert main(run) == 0
    assert "step-00000004: step 4 of 8" in caplog.text
    again = weights(tmp_path / "run")
    assert whole.keys() == again.keys()
    assert all((whole[k] == again[k]).all() for k in whole)


def test_the_example_keeps_the_contract(tmp_path):
    """In a copy of the project, to which its file and a recipe are all that is added."""
    for folder in ("ssl_vit", "configs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    write_example(tmp_path / "ssl_vit" / "methods")
    (tmp_path / "configs" / "simsiam_digits.yaml").write_text(RECIPE)
    files = [f"tests/contract/{file}" for file in CONTRACT]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-k", "simsiam and not timm"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout
    assert not re.search(r"failed|error|skipped", done.stdout.splitlines()[-1])
