"""Files with several planes: which axes count them, which plane is read, all as images."""

import io
import logging
import uuid
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ssl_vit.common.reading import DataConfig, ReadConfig
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.slices import Counted, Planes, count_planes
from ssl_vit.data.sources import Subset, open_source, split_holdout

RNG = np.random.default_rng(0)
GRAY = {"photometric": "minisblack"}


def stack(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **({} if "photometric" in options else GRAY), **options)
    return buffer.getvalue()


def named(array: np.ndarray, axes: str, kind: str = "ome", **options) -> bytes:
    flavour = {"ome": {"ome": True}, "imagej": {"imagej": True}, "shaped": {}}[kind]
    return stack(array, metadata={"axes": axes}, **flavour, **options)


def bytes_of(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def decoded(raw: bytes, channels: int, slices: str = "middle") -> np.ndarray:
    """(H, W, C)."""
    return decode(raw, channels, ReadConfig(slices=slices)).numpy().transpose(1, 2, 0)


def planes(raw: bytes, channels: int) -> int:
    return count_planes(io.BytesIO(raw), channels).planes


# --- axes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [None, "zlib"])
@pytest.mark.parametrize("kind", ["ome", "imagej", "shaped"])
def test_named_axes_are_planes_and_channels(kind, codec):
    if kind == "imagej" and codec:
        pytest.skip("ImageJ does not read it")
    more = {"compression": codec}
    zcyx = bytes_of(5, 3, 20, 30)
    raw = named(zcyx, "ZCYX", kind, **more)
    assert planes(raw, 3) == 5
    np.testing.assert_array_equal(decoded(raw, 3), zcyx[2].transpose(1, 2, 0))
    np.testing.assert_array_equal(decoded(raw, 3, "4"), zcyx[4].transpose(1, 2, 0))
    with pytest.raises(BadImage, match=r"has 5 planes, from 0; --data\.slices is 5"):
        decoded(raw, 3, "5")
    with pytest.raises(BadImage, match=r"3 channels, .* is 5 \(in each of 5 planes, axes ZCYX\)"):
        decoded(raw, 5)


@pytest.mark.parametrize("kind", ["ome", "imagej", "shaped"])
@pytest.mark.parametrize("axis", ["Z", "T"])
def test_a_stack_of_three_planes_is_not_rgb(kind, axis):
    three = bytes_of(3, 20, 30)
    raw = named(three, f"{axis}YX", kind)
    for channels in (1, 3):
        assert planes(raw, channels) == 3
        expected = np.repeat(three[1][..., None], channels, -1)
        np.testing.assert_array_equal(decoded(raw, channels), expected)
    for channels in (2, 4):  # nor planes of any other number
        same = named(bytes_of(channels, 20, 30), f"{axis}YX", kind)
        with pytest.raises(BadImage, match="has 1 channel"):
            decode(same, channels)


@pytest.mark.parametrize("kind", ["ome", "imagej", "shaped"])
def test_channels_by_name_are_channels(kind):
    for count in (2, 3, 4):
        stored = bytes_of(count, 20, 30)
        raw = named(stored, "CYX", kind)
        assert planes(raw, count) == 1
        np.testing.assert_array_equal(decoded(raw, count), stored.transpose(1, 2, 0))
        with pytest.raises(BadImage, match=f"has {count} channels"):
            decode(raw, 7)


def test_the_middle_is_that_of_every_axis():
    stored = bytes_of(4, 7, 2, 20, 30)
    raw = named(stored, "TZCYX")
    assert planes(raw, 2) == 28
    np.testing.assert_array_equal(decoded(raw, 2), stored[2, 3].transpose(1, 2, 0))
    np.testing.assert_array_equal(decoded(raw, 2, "8"), stored[1, 1].transpose(1, 2, 0))
    channels_first = bytes_of(4, 7, 20, 30)
    raw = named(channels_first, "CZYX")
    np.testing.assert_array_equal(decoded(raw, 4), channels_first[:, 3].transpose(1, 2, 0))


def test_colour_pages_are_planes():
    stored = bytes_of(5, 20, 30, 3)
    for options in ({"metadata": None}, {"ome": True, "metadata": {"axes": "ZYXS"}}):
        raw = stack(stored, photometric="rgb", **options)
        assert planes(raw, 3) == 5
        np.testing.assert_array_equal(decoded(raw, 3), stored[2])
    images = [Image.fromarray(page) for page in stored]
    buffer = io.BytesIO()
    images[0].save(buffer, "TIFF", save_all=True, append_images=images[1:], compression="tiff_lzw")
    np.testing.assert_array_equal(decoded(buffer.getvalue(), 3), stored[2])


@pytest.mark.parametrize("options", [{}, {"metadata": None}, {"compression": "zlib"}])
def test_pages_without_a_name(options):
    """As many as --data.channels are channels, but for three, which are a stack."""
    for count in (2, 4, 13):
        stored = bytes_of(count, 20, 30)
        raw = stack(stored, **options)
        assert planes(raw, count) == 1
        np.testing.assert_array_equal(decoded(raw, count), stored.transpose(1, 2, 0))
        assert planes(raw, 1) == count
        np.testing.assert_array_equal(decoded(raw, 1)[..., 0], stored[count // 2])
    three = bytes_of(3, 20, 30)
    raw = stack(three, **options)
    assert planes(raw, 3) == 3
    np.testing.assert_array_equal(decoded(raw, 3), np.repeat(three[1][..., None], 3, -1))
    one_page = stack(three, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(decoded(one_page, 3), three.transpose(1, 2, 0))


@pytest.mark.parametrize("channels", [3, 4, 13])
def test_arrays_with_their_channels_last_are_one_image(channels):
    """Written without a word on what the axes are: each page is a row, as wide as the channels."""
    stored = bytes_of(20, 30, channels)
    raw = stack(stored)
    assert planes(raw, channels) == 1
    np.testing.assert_array_equal(decoded(raw, channels), stored)
    several = bytes_of(5, 20, 30, channels)
    raw = stack(several)
    assert planes(raw, channels) == 5
    np.testing.assert_array_equal(decoded(raw, channels), several[2])


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_npy_stacks_where_it_is_clear():
    stored = bytes_of(5, 20, 30, 3)
    np.testing.assert_array_equal(decoded(npy(stored), 3), stored[2])
    first = npy(np.ascontiguousarray(stored.transpose(0, 3, 1, 2)))
    np.testing.assert_array_equal(decoded(first, 3, "4"), stored[4])
    fortran = npy(np.asfortranarray(stored[0]))
    np.testing.assert_array_equal(decoded(fortran, 3), stored[0])
    gray = npy(bytes_of(5, 20, 30))
    with pytest.raises(BadImage, match=r"5 channels.* is 1; if they are planes .*--data\.slices"):
        decoded(gray, 1)
    assert decoded(gray, 1, "4").shape == (20, 30, 1)
    with pytest.raises(BadImage, match="has 5 planes"):
        decoded(gray, 1, "5")
    assert decoded(gray, 5).shape == (20, 30, 5)
    assert planes(gray, 1) == 5


# --- OME sets ----------------------------------------------------------------------------------


def write_set(folder: Path, files: int, each: str = "C", planes_of: int = 1) -> list[np.ndarray]:
    """An OME-TIFF image spread over files, along one axis; each with a Z stack of its own."""
    names = [f"f_{each}{i}.ome.tif" for i in range(files)]
    ids = [f"urn:uuid:{uuid.UUID(int=i)}" for i in range(files)]
    sizes = {"C": 1, "Z": planes_of, "T": 1} | {each: files}
    data = "".join(
        f'<TiffData First{each}="{i}" FirstZ="{z}" IFD="{z}" PlaneCount="1">'
        f'<UUID FileName="{name}">{own}</UUID></TiffData>'
        for i, (name, own) in enumerate(zip(names, ids, strict=True))
        for z in range(planes_of)
    )
    channels = "".join(
        f'<Channel ID="Channel:0:{c}" SamplesPerPixel="1"/>' for c in range(sizes["C"])
    )
    stored = [RNG.integers(20_000, 60_000, (planes_of, 24, 32), dtype=np.uint16) for _ in names]
    for name, own, pixels in zip(names, ids, stored, strict=True):
        xml = (
            '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/'
            f'Schemas/OME/2016-06" UUID="{own}"><Image ID="Image:0"><Pixels ID="Pixels:0" '
            f'DimensionOrder="XYZCT" Type="uint16" SizeX="32" SizeY="24" SizeC="{sizes["C"]}" '
            f'SizeZ="{sizes["Z"]}" SizeT="{sizes["T"]}">{channels}{data}</Pixels></Image></OME>'
        )
        tifffile.imwrite(folder / name, pixels, description=xml, metadata=None, **GRAY)
    return stored


def test_a_file_of_an_ome_set_is_its_own_planes(tmp_path):
    stored = write_set(tmp_path, 3)
    for i in range(3):
        raw = (tmp_path / f"f_C{i}.ome.tif").read_bytes()
        for channels in (1, 3):
            found = decoded(raw, channels) * 65535
            assert np.abs(found - stored[i][0][..., None]).max() < 0.01
        assert count_planes(io.BytesIO(raw), 1) == Counted(1, "YX", 3)
    with pytest.raises(BadImage, match=r"has 1 channel, .* is 5: it is one of 3 files .*join them"):
        decoded(raw, 5)


def test_a_file_of_an_ome_set_keeps_the_names_of_its_axes(tmp_path):
    stored = write_set(tmp_path, 2, planes_of=5)
    raw = (tmp_path / "f_C1.ome.tif").read_bytes()
    assert count_planes(io.BytesIO(raw), 5) == Counted(5, "ZYX", 2)  # five, but no channels
    assert np.abs(decoded(raw, 1)[..., 0] * 65535 - stored[1][2]).max() < 0.01


def test_files_of_an_ome_set_may_hold_different_parts():
    """A stack that was cut in two by size: five planes, then seven."""
    ids = [f"urn:uuid:{uuid.UUID(int=i)}" for i in range(2)]
    parts = [bytes_of(5, 20, 30), bytes_of(7, 20, 30)]
    data = "".join(
        f'<TiffData FirstZ="{first}" IFD="0" PlaneCount="{len(part)}">'
        f'<UUID FileName="{i}.ome.tif">{ids[i]}</UUID></TiffData>'
        for i, (first, part) in enumerate(zip((0, 5), parts, strict=True))
    )
    for own, part in zip(ids, parts, strict=True):
        xml = (
            f'<OME UUID="{own}"><Image ID="Image:0"><Pixels DimensionOrder="XYZCT" Type="uint8" '
            f'SizeX="30" SizeY="20" SizeC="1" SizeZ="12" SizeT="1">{data}</Pixels></Image></OME>'
        )
        raw = stack(part, description=xml, metadata=None)
        assert count_planes(io.BytesIO(raw), 5) == Counted(len(part), "ZYX", 2)
        np.testing.assert_array_equal(decoded(raw, 1)[..., 0], part[len(part) // 2])


def test_an_ome_file_that_names_itself_alone_keeps_its_axes():
    """Without an identity in its head: such files are written by Fiji and others."""
    own = bytes_of(3, 20, 30)
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="30" SizeY="20" SizeC="3" '
        'SizeZ="1" SizeT="1"><TiffData IFD="0" PlaneCount="3"><UUID FileName="a.ome.tif">'
        "urn:uuid:00000000-0000-0000-0000-000000000001</UUID></TiffData></Pixels></Image></OME>"
    )
    raw = stack(own, description=xml, metadata=None)
    assert count_planes(io.BytesIO(raw), 3) == Counted(1, "CYX", 1)
    np.testing.assert_array_equal(decoded(raw, 3), own.transpose(1, 2, 0))


def test_planes_that_an_ome_file_lacks_are_not_zeros():
    """An acquisition that was stopped: its middle is that of what there is."""
    stored = bytes_of(9, 20, 30) | 1
    whole = named(stored, "TYX")
    xml = tifffile.TiffFile(io.BytesIO(whole)).ome_metadata.replace('SizeT="9"', 'SizeT="40"')
    raw = stack(stored, description=xml, metadata=None)
    assert planes(raw, 1) == 9
    np.testing.assert_array_equal(decoded(raw, 1)[..., 0], stored[4])
    with pytest.raises(BadImage, match="has 9 planes"):
        decoded(raw, 1, "20")


# --- all planes as images ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes; a stack of four, a page, an animation of three frames, a broken stack."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/stack.tif").write_bytes(named(bytes_of(4, 20, 30), "ZYX"))
    Image.fromarray(bytes_of(20, 30)).save(tmp_path / "a/still.png")
    frames = [Image.fromarray(np.full((20, 30), v, np.uint8)) for v in (9, 99, 199)]
    frames[0].save(tmp_path / "b/frames.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "b/broken.tif").write_bytes(named(bytes_of(4, 20, 30), "ZYX")[:900])
    return tmp_path


def test_every_plane_is_an_image(folder, caplog):
    caplog.set_level(logging.INFO, "ssl_vit")
    reading = DataConfig(train=f"folder:{folder}", channels=1, slices="all")
    source = open_source(reading.train, reading)
    names = [source.name(i).removeprefix(f"{folder}/") for i in range(len(source))]
    stacks = [f"a/stack.tif[{i}]" for i in range(4)]
    frames = [f"b/frames.gif[{i}]" for i in range(3)]
    assert names == [*stacks, "a/still.png", "b/broken.tif", *frames]
    assert source.labels.tolist() == [0] * 5 + [1] * 4
    assert source.classes == ("a", "b")
    whole = (folder / "a/stack.tif").read_bytes()
    for i in range(4):
        raw, label = source.read(i)
        assert label == 0
        expected = decode(whole, 1, ReadConfig(slices=str(i)))
        np.testing.assert_array_equal(decode(raw, 1, source.reading).numpy(), expected.numpy())
    with pytest.raises(BadImage):
        decode(source.read(5)[0], 1, source.reading)
    assert [int(decode(source.read(i)[0], 1).max()) for i in (6, 7, 8)] == [9, 99, 199]
    assert "9 images: each plane of 2 files with several, and 2 files with one" in caplog.text


def test_files_of_one_plane_are_the_source_itself(tmp_path):
    for i in range(3):
        Image.fromarray(bytes_of(20, 30)).save(tmp_path / f"{i}.png")
    source = open_source(f"flat:{tmp_path}", ReadConfig(slices="all"))
    assert not isinstance(source, Planes)
    assert len(source) == 3


@pytest.mark.parametrize("count", [20, 3, 500])
def test_planes_of_one_file_are_on_one_side_of_a_split(tmp_path, count):
    for i in range(20):
        (tmp_path / f"{i:02d}.tif").write_bytes(named(bytes_of(2 + i % 5, 8, 9), "ZYX"))
    source = open_source(f"flat:{tmp_path}", ReadConfig(slices="all"), channels=1)
    assert len(source) == 80
    train, held = split_holdout(source, count, seed=1)
    assert len(train) + len(held) == 80
    assert 0 < len(held) <= max(6, min(count, 8))
    assert not set(train.file_of) & set(held.file_of)
    again = split_holdout(source, count, seed=1)[1]
    np.testing.assert_array_equal(held.indices, again.indices)
    part = Subset(held, np.arange(len(held)))
    np.testing.assert_array_equal(part.file_of, held.file_of)
    few = Subset(source, np.arange(30))  # of fewer than ten files none is held out
    assert len(split_holdout(few, count, seed=1)[1]) == 0
    assert len(split_holdout(source, 0, seed=1)[1]) == 0


def test_missing_values_and_depth_survive_as_planes(tmp_path):
    stored = RNG.integers(1, 60_000, (3, 20, 30), dtype=np.uint16)
    stored[1, :4] = 65535
    raw = named(stored, "ZYX", "shaped", extratags=[(42113, "s", 0, "65535", True)])
    (tmp_path / "a.tif").write_bytes(raw)
    reading = DataConfig(channels=1, slices="all")
    source = open_source(f"flat:{tmp_path}", reading)
    found = [decode(source.read(i)[0], 1, reading).numpy()[0] for i in range(3)]
    expected = stored.astype(np.float32) / np.float32(65535)
    expected[1, :4] = np.nan
    np.testing.assert_array_equal(np.stack(found), expected)


class Read(Dataset):
    def __init__(self, source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int):
        return decode(self.source.read(i)[0], 1, self.source.reading)


def test_planes_survive_workers(folder):
    (folder / "b/broken.tif").unlink()
    source = open_source(f"flat:{folder}", ReadConfig(slices="all"), channels=1)
    here = [Read(source)[i] for i in range(len(source))]
    there = list(DataLoader(Read(source), batch_size=None, num_workers=2))
    assert len(here) == len(there) == 8
    assert all((a == b).all() for a, b in zip(here, there, strict=True))


# --- what is said ------------------------------------------------------------------------------


def said(folder: Path, caplog, **reading) -> list[tuple[int, str]]:
    caplog.set_level(logging.INFO, "ssl_vit")
    caplog.clear()
    open_source(f"flat:{folder}", DataConfig(**reading))
    return [(record.levelno, record.getMessage().partition(": ")[2]) for record in caplog.records]


def test_which_plane_is_read_is_said_once(tmp_path, caplog):
    for i in range(3):
        (tmp_path / f"{i}.tif").write_bytes(named(bytes_of(5, 3, 8, 9), "ZCYX"))
    [(level, text)] = said(tmp_path, caplog)
    assert level == logging.INFO
    assert text == (
        "3 of the first 3 files have 5 planes (ZCYX); the middle one is read; --data.slices all "
        "makes each an image"
    )
    assert said(tmp_path, caplog, slices="2") == []


def test_pages_without_a_name_are_a_warning(tmp_path, caplog):
    (tmp_path / "a.tif").write_bytes(stack(bytes_of(13, 8, 9)))
    [(level, text)] = said(tmp_path, caplog)
    assert level == logging.WARNING
    assert text.endswith(
        "13 planes (QYX); the middle one is read; --data.slices all makes each an image, "
        "--data.channels 13 makes them channels"
    )
    assert said(tmp_path, caplog, channels=13) == []


def test_frames_and_sets_are_said(tmp_path, caplog):
    frames = [Image.fromarray(np.full((8, 9), v, np.uint8)) for v in (9, 99)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    [(_, text)] = said(tmp_path, caplog)
    assert text.startswith("1 of the first 1 files have 2 frames; the first one is read")
    (tmp_path / "a.gif").unlink()
    write_set(tmp_path, 3)
    [(level, text)] = said(tmp_path, caplog)
    assert level == logging.WARNING
    assert text == (
        "3 of the first 3 files are each one of 3 files of an OME-TIFF image; each is read as an "
        "image of its own"
    )
