"""The example of docs/methods.md is a whole method: it trains, and goes on to the same bits."""

import re

import pytest
from safetensors.torch import load_file

from ssl_vit import methods
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


@pytest.fixture
def name(tmp_path, monkeypatch):
    """The method of the example, beside the package's own."""
    page = (ROOT / "docs" / "methods.md").read_text()
    code = re.search(r"<!-- example:method -->\n```python\n(.*?)```", page, re.DOTALL)[1]
    assert len(code.splitlines()) <= 60
    (tmp_path / "simsiam.py").write_text(code)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert "simsiam" in method_names()
    return "simsiam"


def weights(folder):
    return load_file(folder / "checkpoints" / "step-00000008" / "task.safetensors")


def test_the_example_trains_and_resumes(name, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([name, *SMALL, "--run.out", str(whole)]) == 0
    assert "simsiam encoder" in capsys.readouterr().out
    half = [name, *SMALL, "--run.out", str(parts)]
    assert main([*half, "--run.keep", "5"]) == 0
    first = parts / "checkpoints" / "step-00000004"
    assert first.is_dir()
    for later in (parts / "checkpoints").glob("step-00000008"):
        later.rename(tmp_path / "gone")  # as if it had been killed before
    assert main([*half, "--run.keep", "5"]) == 0
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys()
    assert all((a[k] == b[k]).all() for k in a)
