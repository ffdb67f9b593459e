"""Files that would execute something if they were unpickled, or read as YAML with objects.

Each bomb is real: a control shows that the careless way of reading it leaves the marker behind.
"""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ssl_vit import pretrain
from ssl_vit.common.errors import UserError
from ssl_vit.weights.official import open_weights
from tests.distributed.lives import Lives
from tests.integration.conftest import TINY

QUICK = ("mae", "--config", "tiny.yaml", "--data.val", "", "--data.holdout", "0")
QUICK += ("--run.length", "2st", "--run.probe-images", "20", "--optim.batch-size", "20")
# Given, for none of these is about them: estimated ones are of all images, anew for each call.
QUICK += ("--data.mean", "0.3", "--data.std", "0.4")


class Bomb:
    """Pickled as a call of ``os.system``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def torch_saved(content: object, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def bombs(marker: Path) -> dict[str, bytes]:
    """The same call in each form that a pickle comes in."""
    content = {"model": Bomb(marker)}
    return {
        "text pickle": pickle.dumps(Bomb(marker), protocol=0),
        "binary pickle": pickle.dumps(content),
        "torch zip": torch_saved(content, zipped=True),
        "torch legacy": torch_saved(content, zipped=False),
    }


def yaml_bomb(marker: Path) -> str:
    return f"!!python/object/apply:os.system ['touch {marker}']"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished run, and the options it was made with."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "tiny.yaml").write_text(TINY)
    life = Lives(folder).start(*QUICK, "--run.out", "run")
    assert life.wait() == [0], life.said()
    return folder


@pytest.fixture
def marker(tmp_path, folder, monkeypatch):
    """What a bomb would create; at the end of every test it must not be there."""
    monkeypatch.chdir(folder)
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "it was executed"


def refused(call, *fragments: str) -> None:
    """One clear line that holds the fragments; not what is executed, in full."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert len(text) < 500, text
    for fragment in fragments:
        assert fragment in text


def test_the_bombs_are_real(tmp_path):
    """Read without care, each of them goes off."""
    for name, content in bombs(tmp_path / "marker").items():
        if name.startswith("torch"):
            torch.load(io.BytesIO(content), weights_only=False)
        else:
            pickle.loads(content)
        (tmp_path / "marker").unlink()
    yaml.unsafe_load(yaml_bomb(tmp_path / "marker"))
    (tmp_path / "marker").unlink()


def plant(checkpoint: Path, name: str, content: bytes) -> None:
    """Put ``content`` into a file of a checkpoint, which gives its size as that of the file."""
    (checkpoint / name).write_bytes(content)
    if name != "state.json":
        state = json.loads((checkpoint / "state.json").read_text())
        state["files"][name] = len(content)
        (checkpoint / "state.json").write_text(json.dumps(state))


def test_every_file_of_a_checkpoint(marker):
    """In every form of pickle; the run goes on neither from its own nor from another's.

    A file of another size than the state says is no part of a checkpoint; these have the right one.
    """
    names = sorted(p.name for p in Path("run/checkpoints/step-00000002").iterdir())
    assert names == ["optimizer.safetensors", "state.json", "task.safetensors"]
    for name in names:
        for form, content in bombs(marker).items():
            shutil.copytree("run", "victim")
            path = Path("victim/checkpoints/step-00000002")
            plant(path, name, content)
            refused(lambda: pretrain.main([*QUICK, "--run.out", "victim"]), name)
            if form == "torch zip":
                other = ("--run.out", "new", "--run.resume", str(path))
                refused(lambda args=other: pretrain.main([*QUICK, *args]), name)
                assert not Path("new").exists()
            shutil.rmtree("victim")


@pytest.mark.parametrize(
    "text",
    [
        '{"step": {"py/reduce": ["os.system", ["touch MARKER"]]}}',
        '{"__reduce__": ["os.system", ["touch MARKER"]]}',
        '!!python/object/apply:os.system ["touch MARKER"]',
        '{"step": -5}',
        '{"step": 1e999}',
        '{"step": 2, "world": 1000000000}',
        "[" * 100_000,
        "null",
    ],
    ids=["py-reduce", "reduce", "yaml", "negative", "infinite", "many", "nested", "null"],
)
def test_the_state_of_a_checkpoint(marker, tmp_path, text):
    path = tmp_path / "step-00000002"
    shutil.copytree("run/checkpoints/step-00000002", path)
    (path / "state.json").write_text(text.replace("MARKER", str(marker)))
    call = [*QUICK, "--run.out", str(tmp_path / "new"), "--run.resume", str(path)]
    refused(lambda: pretrain.main(call), "state.json is damaged")
    assert not (tmp_path / "new").exists()


def own_file(path: Path, about: str) -> Path:
    """The run's encoder under metadata of somebody else's making."""
    save_file(load_file("run/encoder.safetensors"), path, metadata={"ssl_vit": about})
    return path


@pytest.mark.parametrize(
    "info",
    [
        '{"__reduce__": ["os.system", ["touch MARKER"]]}',
        '{"config": {"arch": {"py/reduce": ["os.system", ["touch MARKER"]]}}}',
        '"!!python/object/apply:os.system [touch MARKER]"',
        '{"config": {"image_size": "!!python/object/apply:os.system [touch MARKER]"}}',
    ],
)
def test_metadata_of_an_encoder(marker, tmp_path, info):
    content = f'{{"info": {info.replace("MARKER", str(marker))}, "timm": {{}}}}'
    path = own_file(tmp_path / "encoder.safetensors", content)
    refused(lambda: open_weights(path), "encoder.safetensors: metadata of another version")


@pytest.mark.parametrize(
    "change",
    [
        {"arch": "hf-hub:nobody/nothing"},
        {"arch": "local-dir:/tmp"},
        {"arch": "../../../etc/passwd"},
        {"heads": -1},
        {"width": 2**40},
        {"depth": 10**9},
        {"image_size": [10**9, 10**9]},
    ],
    ids=str,
)
def test_architecture_in_the_metadata(marker, tmp_path, change):
    """Neither fetched from anywhere, nor given the memory that it asks for."""
    before = json.loads(read_metadata(Path("run/encoder.safetensors")))
    before["info"]["config"] |= change
    path = own_file(tmp_path / "encoder.safetensors", json.dumps(before))
    refused(lambda: open_weights(path))


def read_metadata(path: Path) -> str:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size))["__metadata__"]["ssl_vit"]


def test_files_of_hugging_face(marker, tmp_path):
    """A folder of theirs has several files; each of them may be the bomb."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        for content in bombs(marker).values():
            other = tmp_path / "other"
            shutil.rmtree(other, ignore_errors=True)
            other.mkdir()
            (other / name).write_bytes(content)
            refused(lambda other=other: open_weights(other), name)


def test_the_options_of_a_run(marker, tmp_path):
    """config.yaml in the folder that goes on, and as what the options are read from."""
    shutil.copytree("run", tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(f"run: {yaml_bomb(marker)}\n")
    refused(lambda: pretrain.main([*QUICK, "--run.out", str(tmp_path / "run")]), "config.yaml")
    refused(lambda: pretrain.main(["mae", "--config", str(path)]), "config.yaml", "YAML")


def test_real_doors_leave_with_status_2(folder, marker):
    """What the calls above raise, as a user meets it."""
    bomb = bombs(marker)["torch zip"]
    Path("bomb.pth").write_bytes(bomb)
    shutil.copytree("run", "other")
    plant(Path("other/checkpoints/step-00000002"), "optimizer.safetensors", bomb)
    sets = ("--data.train", "digits:train", "--data.val", "digits:val")
    lives = Lives(folder)
    calls = {
        "optimizer.safetensors": lives.start(*QUICK, "--run.out", "other"),
        "bomb.pth": lives.start(*QUICK, "--run.out", "new", "--init.encoder", "bomb.pth"),
        "a pickle of": lives.start("knn", "--encoder", "bomb.pth", *sets, door="evaluate"),
    }
    for fragment, life in calls.items():
        assert life.wait() == [2], life.said()
        lines = life.said().splitlines()
        assert len(lines) == 1, life.said()
        assert lines[0].startswith("error: ")
        assert fragment in lines[0]
    assert not Path("new").exists()
