"""Images of a run: which statistics they are normalised by, and what is said of their values."""

from pathlib import Path

import numpy as np
import pytest

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import DataConfig
from ssl_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD
from ssl_vit.data.base import Source, split_holdout
from ssl_vit.data.folder import FolderSource
from ssl_vit.data.images import Given, Images, open_images
from ssl_vit.data.sources import open_source
from ssl_vit.data.statistics import FEW

N = 40


def fill(folder: Path, kind: str, low: float, top: float, channels: int = 3, n: int = N) -> str:
    """``n`` arrays of uniform values of this kind; their source."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        np.save(folder / f"{kind}-{i}.npy", rng.uniform(low, top, (8, 9, channels)).astype(kind))
    return f"flat:{folder}"


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Images of these options; ``reads`` counts the files of both sets that are read."""
    reads: list[int] = []
    before = FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda self, i: reads.append(i) or before(self, i))

    def opened(train: str, given: Given | None = None, **options) -> tuple[Images, int]:
        reads.clear()
        return open_images(DataConfig(train=train, **options), 0, given), len(reads)

    return opened


def test_eight_bit_photographs_have_imagenets_and_are_not_read_through(opened, tmp_path):
    images, reads = opened(fill(tmp_path, "u1", 0, 256))
    assert (images.mean, images.std, images.deep) == (IMAGENET_MEAN, IMAGENET_STD, False)
    assert reads == FEW + 1  # one that is held out; whether files have planes, headers tell
    assert images.warnings == ()
    text = "mean 0.485, 0.456, 0.406, deviation 0.229, 0.224, 0.225: ImageNet's"
    assert images.about() == [("normalised by", text)]


@pytest.mark.parametrize(
    ("kind", "low", "top", "mean"),
    [("u2", 0, 4096, 2048 / 65535), ("i2", 500, 2500, 1500), ("f4", -1, 1, 0)],
)
def test_deeper_images_have_their_own(opened, tmp_path, kind, low, top, mean):
    """Also of three channels; they have mean 0 and deviation 1 for the network."""
    images, reads = opened(fill(tmp_path, kind, low, top))
    spread = (top - low) / 12**0.5 / (65535 if kind == "u2" else 1)
    assert images.deep
    assert images.mean == pytest.approx([mean] * 3, abs=0.1 * spread)
    assert images.std == pytest.approx([spread] * 3, rel=0.03)
    assert images.survey.misfit(images.mean, images.std) == ""
    assert "estimated from 36 training images" in images.about()[0][1]
    assert reads == FEW + 1 + 36


def test_a_mix_of_depths_has_its_own_whatever_comes_first(opened, tmp_path):
    """Each in the scale in which the network gets it; deeper ones behind 8-bit ones are seen."""
    fill(tmp_path, "u1", 0, 256)
    images, _ = opened(fill(tmp_path, "u2", 0, 65536))
    assert images.deep
    assert images.mean == pytest.approx([0.5] * 3, abs=0.02)
    text = images.about()[0][1]
    assert "estimated from 72 training images, " in text
    assert text.endswith("of them of more than 8 bits")


def test_five_channels_are_shown_in_a_row(opened, tmp_path):
    images, _ = opened(fill(tmp_path, "u1", 0, 256, channels=5), channels=5)
    assert " ... (5 channels), deviation " in images.about()[0][1]
    assert len(images.mean) == 5
    assert not images.deep


def test_held_out_images_that_cannot_be_read_are_told_as_such(tmp_path):
    """With the way to others."""
    spec = fill(tmp_path, "u1", 0, 256)
    _, held = split_holdout(open_source(spec), 2, seed=0)
    for i in range(len(held)):
        Path(held.name(i)).write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    with pytest.raises(UserError) as error:
        open_images(DataConfig(train=spec, holdout=2), 0)
    assert str(error.value).startswith(
        f"none of 2 held-out images of {spec} can be read, the first"
    )
    assert str(error.value).endswith("give some by --data.val, or --data.holdout 0 for none")


def test_given_statistics_are_taken_and_judged(opened, tmp_path):
    spec = fill(tmp_path, "i2", 500, 2500)
    images, reads = opened(spec, mean=(1500.0,) * 3, std=(600.0,) * 3)
    assert images.mean == (1500.0,) * 3
    assert images.warnings == ()
    assert images.about()[0][1].endswith("as given by --data.mean and --data.std")
    assert reads == FEW + 1
    (said,) = opened(spec, mean=IMAGENET_MEAN, std=IMAGENET_STD)[0].warnings
    assert said.startswith("the training images have mean 1")
    assert "the encoder is given values around 6," in said
    assert "16 bits are decoded to 0..1" in said


def test_statistics_of_an_encoder_are_said_to_be_its_own(opened, tmp_path):
    spec = fill(tmp_path, "i2", 500, 2500)
    given = Given("--init.encoder a.pth", IMAGENET_MEAN, IMAGENET_STD)
    images, _ = opened(spec, given, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert images.about()[0][1].endswith("those of --init.encoder a.pth")
    assert images.warnings[0].endswith(
        "(those of --init.encoder a.pth); give --data.statistics auto"
    )
    images, _ = opened(spec, given, statistics="auto")
    assert images.mean == pytest.approx([1500] * 3, rel=0.03)
    assert images.warnings == ()


def test_missing_pixels_are_counted(opened, tmp_path):
    fill(tmp_path, "f4", 0, 1, n=30)
    for i in range(10):
        image = np.random.default_rng(i).random((8, 8, 3), np.float32)
        image[: 8 if i < 4 else 4] = np.nan
        np.save(tmp_path / f"z{i}.npy", image)
    images, _ = opened(f"flat:{tmp_path}", holdout=0, max_bad=0.2)
    assert images.about()[1] == (
        "no data",
        "17.5 % of the pixels of 40 images looked at (--data.nodata auto); 4 of them hold none",
    )
    assert images.warnings == ()
    (said,) = opened(f"flat:{tmp_path}", holdout=0)[0].warnings
    assert "4 of 40 images looked at hold no data" in said
    assert "--data.max-bad 0.05" in said


@pytest.mark.parametrize("split", ["train", "val"])
def test_other_channels_name_the_option_to_give(opened, tmp_path, split):
    """Of either set; with an encoder, whose channels no option changes, that is named."""
    three, four = fill(tmp_path / "3", "u1", 0, 256), fill(tmp_path / "4", "u2", 0, 256, 4)
    sets = (four, three) if split == "train" else (three, four)
    with pytest.raises(UserError, match=r"have 4 channels; .*: give --data.channels 4"):
        opened(sets[0], val=sets[1])
    given = Given("--init.encoder a.pth", IMAGENET_MEAN, IMAGENET_STD)
    with pytest.raises(UserError, match=r"4 channels; --init.encoder a.pth takes images of 3"):
        opened(sets[0], given, val=sets[1])


def test_all_processes_find_the_same(opened, tmp_path):
    """What is looked at is a function of the seed."""
    spec = fill(tmp_path, "f4", -1, 1)
    one, two = (opened(spec)[0] for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert isinstance(one.train, Source)
