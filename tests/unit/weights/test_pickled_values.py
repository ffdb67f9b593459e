"""Values that trainings store beside weights: read by stand-ins, of which none does anything."""

import argparse
import pathlib
import pickle

import numpy as np
import pytest
import torch

from ssl_vit.weights.decoders import read_decoder
from ssl_vit.weights.official import open_weights
from ssl_vit.weights.reading import read_content
from tests.unit.foreign_weights import agree, images, refused, saved, vit
from tests.unit.weights.test_decoders import official_state

VALUES = {
    "path": pathlib.Path("/scratch/1"),
    "pure": pathlib.PurePosixPath("a/b"),
    "windows": pathlib.PureWindowsPath("C:/x"),
    "float": np.float64(0.8),
    "single": np.float32(0.5),
    "integer": np.int64(-3),
    "flag": np.bool_(True),
    "big": np.dtype(">f4").type(0.25),
    "text": np.str_("best"),
    "array": np.arange(6.0).reshape(2, 3),
    "dtype": np.dtype("float32"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_paths_and_numbers_of_numpy(tmp_path, legacy, wrapped):
    """In the options of MAE's own submitit script, and beside them; both formats of torch."""
    model = vit(num_classes=0)
    content = {"model": model.state_dict(), "args": argparse.Namespace(**VALUES), "epoch": 3}
    content |= {} if wrapped else VALUES
    path = tmp_path / "mae.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    agree(open_weights(path), model.forward_features(images()))
    found = vars(read_content(path)["args"])
    assert str(found["path"]) == "/scratch/1"
    assert not isinstance(found["path"], pathlib.Path)  # which could touch a disk
    assert found["windows"] == VALUES["windows"]
    for name in ("float", "single", "integer", "flag", "big", "text"):
        assert found[name] == VALUES[name]
        assert type(found[name]) in (float, int, bool, str)
    assert not isinstance(found["array"], np.ndarray)


def test_numbers_of_numpy_are_numbers_where_they_are_used(tmp_path):
    options = argparse.Namespace(mask_ratio=np.float64(0.5), norm_pix_loss=True)
    path = saved({"model": official_state()[1], "args": options}, tmp_path)
    found = read_decoder(path)
    assert (found.mask_ratio, found.normalized) == (0.5, True)


class Reduced:
    """What a pickle of it calls, with which arguments, and with which state."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


def scalar_of(dtype, raw):
    return Reduced(np.float64(1).__reduce__()[0], (dtype, raw))


def touch(path):
    """Harmless: what a hostile file would have called."""
    pathlib.Path(path).touch()


def an_object(marker):
    return scalar_of(np.dtype("O"), Reduced(touch, (str(marker),)))


ATTEMPTS = {
    "a function of a path": lambda marker: Reduced(touch, (str(marker),)),
    "a class that is not named": lambda marker: Reduced(pathlib.Path(marker).write_text, ("x",)),
    "numpy's load": lambda marker: Reduced(np.load, (str(marker),)),
    "an object in a scalar": an_object,
    "bytes as a pointer": lambda marker: scalar_of(np.dtype([("a", "O")]), b"12345678"),
    "bytes of another length": lambda marker: scalar_of(np.dtype("f8"), b"123"),
    "no bytes": lambda marker: scalar_of(np.dtype("f8"), 3),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ATTEMPTS)
def test_whatever_tries_more_is_refused(tmp_path, kind, legacy):
    marker, path = tmp_path / "marker", tmp_path / "mae.pth"
    content = {"model": vit(num_classes=0).state_dict(), "args": ATTEMPTS[kind](marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    refused(path, "refused: a pickle of|damaged, or not a file of weights")
    assert not marker.exists()


def test_the_attempts_would_have_worked(tmp_path):
    """With Python's own reader, which is why it is not used."""
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(ATTEMPTS["a function of a path"](marker)))
    assert marker.exists()


def test_a_shard_of_a_process_is_refused_with_the_file_to_take(tmp_path):
    """DINOv2's rank files of several processes: by the class's name, nothing of it is imported."""
    path = tmp_path / "model_final.rank_0.pth"
    content = {"model": vit(num_classes=0).state_dict(), "part": np.float64(1)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    name = b"cnumpy._core.multiarray\nscalar\n"
    assert name in raw
    other = b"ctorch.distributed._shard.sharded_tensor.api\nShardedTensor\n"
    path.write_bytes(raw.replace(name, other))
    refused(path, "one process's part of a sharded network.*teacher_checkpoint.pth")
