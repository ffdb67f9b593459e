"""The embedding door as a process: killed at any moment and started again, and by several."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from ssl_vit.evaluators.feature_files import read_card
from tests.distributed.together import together
from tests.integration.conftest import Door

# Kills the process without warning at a moment that a test chooses: by the file that it writes.
KILLER = """
import os, signal, sys
from ssl_vit import embed
from ssl_vit.commands import cli
from ssl_vit.evaluators import feature_files, feature_parts

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def at_call(n, real):
    calls = iter(range(1, 1000))
    return lambda *a, **k: die() if next(calls) == n else real(*a, **k)

moment = sys.argv.pop(1)
if moment == "part":
    real = feature_parts.save_file

    def half(tensors, path, metadata):
        real(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[:200])
        die()

    calls = iter(range(3))
    feature_parts.save_file = lambda *a, **k: (real if next(calls) < 2 else half)(*a, **k)
elif moment == "file":
    feature_files._member = at_call(4, feature_files._member)
elif moment == "beside":
    npy = feature_files.FORMATS[".npy"]
    feature_files.FORMATS[".npy"] = npy._replace(write=die)
elif moment == "end":
    feature_parts.Parts.clear = at_call(2, feature_parts.Parts.clear)  # the first is to begin
cli.run_door(embed.main)
"""
# 1,797 images: parts of one batch.
ASKED = ("--data.train", "digits", "--batch-size", "200", "--device", "cpu", "--encoder", "run")
ASKED = (*ASKED, "--data.workers", "0")


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Door:
    """The encoder of an eight-step run, and its features by a process that was left alone."""
    door = Door(tmp_path_factory.mktemp("embed"))
    (door.folder / "killer.py").write_text(KILLER)
    result = door.pretrain("--run.out", "run", "--run.length", "8st")
    assert result.returncode == 0, result.stderr
    for out in ("alone.npz", "alone.npy"):
        result = door("-m", "ssl_vit.embed", *ASKED, "--out", out)
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"features of 1,797 images: {out}\n"
    return door


def test_killed_at_any_moment_it_ends_with_the_same_bytes(door):
    out, partial = door.folder / "x.npz", door.folder / "x.npz.partial"
    parts = []
    for moment in ("part", "part", "file", "file"):
        result = door("killer.py", moment, *ASKED, "--out", "x.npz")
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert not out.exists()
        parts.append(len(list(partial.glob("images-*"))))
    assert parts == [2, 4, 9, 9]
    result = door("-m", "ssl_vit.embed", *ASKED, "--out", "x.npz")
    assert result.returncode == 0, result.stderr
    assert "x.npz.partial: goes on after 1,797 images" in result.stderr
    assert out.read_bytes() == (door.folder / "alone.npz").read_bytes()
    assert left(door, "x.npz") == ["x.npz"]
    assert len(np.unique(np.load(out)["names"])) == 1797


def test_killed_when_the_file_was_there_it_is_finished(door):
    result = door("killer.py", "end", *ASKED, "--out", "y.npz")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert read_card(door.folder / "y.npz") is not None
    result = door("-m", "ssl_vit.embed", *ASKED, "--out", "y.npz")
    assert result.returncode == 0, result.stderr
    assert "nothing to do: y.npz is there" in result.stdout
    assert left(door, "y.npz") == ["y.npz"]


def test_names_without_their_array_are_not_finished(door):
    result = door("killer.py", "beside", *ASKED, "--out", "z.npy")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert left(door, "z.npy") == ["z.npy.csv", "z.npy.json", "z.npy.partial"]
    assert door("-m", "ssl_vit.embed", *ASKED, "--out", "z.npy").returncode == 0
    assert left(door, "z.npy") == ["z.npy", "z.npy.csv", "z.npy.json"]
    for suffix in ("", ".csv", ".json"):
        wanted = door.folder / f"alone.npy{suffix}"
        assert (door.folder / f"z.npy{suffix}").read_bytes() == wanted.read_bytes()


def test_two_processes_write_what_one_does(door):
    """From the start; and the rest of what one alone was killed in."""
    assert door("killer.py", "part", *ASKED, "--out", "v.npz").returncode == -signal.SIGKILL
    for out in ("u.npz", "v.npz"):
        done = together(door, 2, "-m", "ssl_vit.embed", *ASKED, "--out", out)
        assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
        assert "".join(d.stdout for d in done) == f"features of 1,797 images: {out}\n"
        made = (door.folder / out).read_bytes()
        assert made == (door.folder / "alone.npz").read_bytes()
    done = together(door, 2, "-m", "ssl_vit.embed", *ASKED, "--out", "u.npz")
    assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
    refused = together(door, 2, "-m", "ssl_vit.embed", *ASKED, "--size", "4", "--out", "u.npz")
    assert [d.returncode for d in refused] == [2, 2]
    errors = [line for d in refused for line in d.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: u.npz is of other options or versions: transform size")


def left(door: Door, name: str) -> list[str]:
    """Files of this name, and of what belongs to it."""
    return sorted(path.name for path in Path(door.folder).glob(f"*{name}*"))


def test_the_card_of_a_file_beside_its_array(door):
    card = json.loads((door.folder / "alone.npy.json").read_text())
    assert (card["rows"], card["features"]) == (1797, {"cls": [32]})
