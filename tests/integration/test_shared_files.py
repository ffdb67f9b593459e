"""What doors leave can be read by those whom the umask allows to read it."""

import os
import stat
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import ones

from ssl_vit import embed, evaluate, export, pretrain, report
from ssl_vit.common.files import write_atomically
from tests.integration.conftest import TINY

# What new files and folders have under each umask.
MODES = {0o027: (0o640, 0o750), 0o002: (0o664, 0o775), 0o077: (0o600, 0o700)}


@pytest.fixture
def under():
    """Sets the umask, until the test ends."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """The mode of every file and folder, by its place in ``folder``."""
    return {str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*")}


@pytest.mark.parametrize("umask", MODES)
def test_a_file_of_tensors_follows_the_umask(umask, under, tmp_path):
    """safetensors alone leaves 0600."""
    under(umask)
    write_atomically(tmp_path / "a", lambda path: save_file({"x": ones(1)}, path))
    assert modes(tmp_path) == {"a": MODES[umask][0]}


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_all_that_doors_leave_follows_the_umask(umask, under, tmp_path, monkeypatch):
    """A run with checkpoints and pictures, scores, exports, a report, and the cache of features."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    under(umask)
    Path("tiny.yaml").write_text(TINY)
    short = ("--run.length", "2st", "--run.save-every", "1st", "--run.device", "cpu")
    short += ("--optim.batch-size", "20", "--data.mean", "0.3", "--data.std", "0.4")
    assert not pretrain.main(["mae", "--config", "tiny.yaml", "--run.out", "run", *short])
    given = ("--encoder", "run", "--data.train", "digits:val", "--data.val", "digits:val")
    assert not evaluate.main(["knn", *given, "--out", "scores.json", "--device", "cpu"])
    for out in ("x.npz", "x.npy"):
        given = ("--encoder", "run", "--data.train", "digits:val", "--out", out)
        assert not embed.main([*given, "--device", "cpu"])
    for kind in ("timm", "huggingface", "onnx"):
        assert not export.main(["--to", kind, "--encoder", "run"])
    assert not report.main(["run"])
    found, (file, folder) = modes(tmp_path), MODES[umask]
    wrong = {
        name: oct(mode)
        for name, mode in found.items()
        if mode != (folder if Path(name).is_dir() else file)
    }
    assert not wrong
    left = " ".join(found)
    for name in ("task.safetensors", "encoder.safetensors", "model.safetensors", ".onnx", ".html"):
        assert name in left
    assert any(name.startswith("cache/features/") for name in found)
