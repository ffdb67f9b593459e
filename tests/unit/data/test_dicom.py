"""DICOM: the pixels of pydicom's own pipeline, scaled to 0..1, of its files and of written ones."""

import builtins
import io
import logging
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import DataConfig, ReadConfig
from ssl_vit.data.base import Source
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.formats import HEAD, format_of
from ssl_vit.data.images import open_images
from ssl_vit.data.slices import Planes
from ssl_vit.data.sources import open_source

pydicom = pytest.importorskip("pydicom")
from pydicom.dataelem import DataElement  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import (  # noqa: E402
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"
FILES = sorted(p for p in SHIPPED.rglob("*") if p.is_file() and p.suffix in (".dcm", ""))
RNG = np.random.default_rng(0)
TWELVE = RNG.integers(0, 4096, (40, 36)).astype(np.uint16)


def decoded(raw: bytes, channels: int = 1, **reading: Any) -> np.ndarray:
    """(H, W, C); padding is a value."""
    options = {"nodata": "none"} | reading
    return decode(raw, channels, ReadConfig(**options)).numpy().transpose(1, 2, 0)


def written(pixels: np.ndarray, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """A DICOM file of pixels (frames, H, W) or (H, W) or (H, W, 3), by pydicom."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    if pixels.ndim == 3 and not colour:
        dataset.NumberOfFrames = len(pixels)
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        if isinstance(value, DataElement):
            dataset.add(value)
        else:
            setattr(dataset, name, value)
    dataset.HighBit = dataset.BitsStored - 1
    big = syntax == ExplicitVRBigEndian
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
    dataset["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    compressed = syntax in (JPEG2000Lossless, RLELossless)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if compressed else syntax
    if compressed:
        dataset.compress(syntax, generate_instance_uid=False)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def ends(dataset: Dataset) -> np.ndarray:
    bits = dataset.BitsStored
    signed = dataset.PixelRepresentation
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.array([low, high])


def by_pydicom(dataset: Dataset) -> np.ndarray:
    """Middle frame by pydicom's pipeline, from the ends of what its bits can hold to 0..1."""
    stored = dataset.pixel_array
    frames = int(dataset.get("NumberOfFrames") or 1)
    stored = stored[frames // 2] if frames > 1 else stored
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        rgb = apply_color_lut(stored, dataset)
        return (rgb >> 8 if rgb.dtype == np.uint16 else rgb) / 255
    if dataset.SamplesPerPixel == 3:
        bits = dataset.BitsStored
        return stored.astype(np.float32) if bits > 16 else stored / (2**bits - 1)
    shown = apply_voi_lut(apply_modality_lut(stored, dataset), dataset)
    if dataset.BitsStored > 16:
        return shown[..., None].astype(np.float32)
    low, high = sorted(apply_modality_lut(ends(dataset), dataset).tolist())
    shown = (shown.astype(np.float64) - low) / (high - low)
    return (1 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown)[..., None]


def near(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to what is expected in 0..1: 8-bit results to half a level, others to rounding."""
    if found.dtype == np.uint8:
        np.testing.assert_allclose(found / 255, expected, rtol=0, atol=0.5001 / 255)
    else:
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_every_file_of_pydicom_that_it_decodes_is_read_as_by_its_pipeline():
    read, refused = 0, []
    for path in FILES:
        raw = path.read_bytes()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dataset = pydicom.dcmread(path, force=True)
                expected = by_pydicom(dataset)
        except Exception:
            with pytest.raises(BadImage) as error:
                decoded(raw)
            refused.append(str(error.value))
            continue
        found = decoded(raw, expected.shape[2])
        assert (found.dtype == np.uint8) == (dataset.BitsStored <= 8), path.name
        try:
            near(found, expected)
        except AssertionError as error:
            raise AssertionError(f"{path.name}: {error}") from None
        read += 1
    assert read > 55
    assert not [text for text in refused if "\n" in text]
    assert {
        "holds no pixels: RT Structure Set Storage",
        "holds no pixels: Basic Text SR Storage",
    } < {*refused}


# --- written files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "syntax",
    [
        *(ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian),
        *(DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless),
    ],
)
def test_twelve_bits_and_every_frame_in_each_transfer_syntax(syntax):
    frames = RNG.integers(0, 4096, (5, 40, 36)).astype(np.uint16)
    raw = written(frames, syntax, BitsStored=12)
    expected = (frames / 4095).astype(np.float32)
    for slices, number in (("middle", 2), ("all", 2), ("0", 0), ("4", 4)):
        found = decoded(raw, slices=slices)
        np.testing.assert_array_equal(found[..., 0], expected[number], strict=True)
    assert found.max() > 0.9
    with pytest.raises(BadImage, match=r"has 5 planes, from 0; --data\.slices is 5"):
        decoded(raw, slices="5")


def test_more_pixels_than_values_are_converted_alike():
    few = RNG.integers(-2048, 2048, (40, 36)).astype(np.int16)
    many = np.tile(few, (20, 20))
    for stored in (few, few.astype(">i2"), (few % 256).astype(np.uint8)):
        options = {"RescaleSlope": 2, "RescaleIntercept": -100}
        one, tiled = (written(array, **options) for array in (stored, np.tile(stored, (20, 20))))
        np.testing.assert_array_equal(decoded(tiled), np.tile(decoded(one), (20, 20, 1)))
    assert many.size > 2**16


def test_signed_values_rescale_and_windows():
    stored = np.arange(-1440, 1440, 2, dtype=np.int16).reshape(40, 36)
    scale = {"BitsStored": 12, "RescaleSlope": 2, "RescaleIntercept": 100}
    windows = {"WindowCenter": [40, 500], "WindowWidth": [400, 100]}
    units = stored * 2.0 + 100
    full = (stored + 2048) / 4095
    first = np.clip((units - 39.5) / 399 + 0.5, 0, 1)
    raw = written(stored, **scale, **windows)
    for window, expected in (
        (("file",), first),
        (("full",), full),
        (("40", "400"), first),
        (("0", "0.5"), np.clip(units / 0.5 + 0.5, 0, 1)),
        (("0", "1"), (units > -0.5).astype(float)),
    ):
        near(decoded(raw, window=window), expected[..., None])
        inverted = written(stored, **scale, **windows, PhotometricInterpretation="MONOCHROME1")
        near(decoded(inverted, window=window), 1 - expected[..., None])
    near(decoded(written(stored, **scale)), full[..., None])
    empty = written(stored, BitsStored=12, RescaleSlope=None, RescaleIntercept=None)
    near(decoded(empty), full[..., None])
    for function, at in (("LINEAR_EXACT", -160.0), ("SIGMOID", 40.0)):
        raw = written(
            np.array([[-130, -30]], np.int16), **scale, **windows, VOILUTFunction=function
        )
        value = decoded(raw)[0, 0, 0]
        assert value == pytest.approx({-160.0: 0.0, 40.0: 1 / (1 + np.exp(2))}[at], abs=1e-6)


def test_a_falling_slope_and_a_window_of_no_width():
    stored = np.array([[0, 4095]], np.uint16)
    raw = written(stored, BitsStored=12, RescaleSlope=-1, RescaleIntercept=0)
    assert decoded(raw).ravel().tolist() == [1, 0]
    raw = written(stored, BitsStored=12, WindowCenter=40, WindowWidth=0)
    with pytest.raises(BadImage, match=r"window of width 0; --data\.window full, or CENTER WIDTH"):
        decoded(raw)
    assert decoded(raw, window=("full",)).ravel().tolist() == [0, 1]


def test_eight_bits_stay_eight_and_few_are_scaled_to_them():
    stored = RNG.integers(0, 256, (40, 36)).astype(np.uint8)
    np.testing.assert_array_equal(decoded(written(stored))[..., 0], stored, strict=True)
    inverted = decoded(written(stored, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(inverted[..., 0], 255 - stored, strict=True)
    windowed = decoded(written(stored, WindowCenter=128, WindowWidth=101))[..., 0]
    expected = np.clip((stored - 127.5) / 100 + 0.5, 0, 1)
    np.testing.assert_array_equal(windowed, np.rint(255 * expected).astype(np.uint8), strict=True)
    few = decoded(written(stored % 16, BitsStored=4))[..., 0]
    np.testing.assert_array_equal(few, stored % 16 * 17, strict=True)
    wide = (stored % 16).astype(np.uint16)
    np.testing.assert_array_equal(decoded(written(wide, BitsStored=4))[..., 0], few, strict=True)


def test_colours_of_any_depth():
    rgb = RNG.integers(0, 256, (40, 36, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decoded(written(rgb), 3), rgb, strict=True)
    deep = RNG.integers(0, 4096, (40, 36, 3)).astype(np.uint16)
    found = decoded(written(deep, BitsStored=12), 3)
    np.testing.assert_allclose(found, deep / 4095, rtol=1e-6)
    wide = decoded(written(rgb.astype(np.uint16), BitsStored=8), 3)
    np.testing.assert_array_equal(wide, rgb, strict=True)
    assert decoded(written(rgb), 1).shape == (40, 36, 1)
    with pytest.raises(BadImage, match="has 3 channels"):
        decoded(written(rgb), 5)


def table(values: np.ndarray, bits: int, first: int = 0) -> Sequence:
    item = Dataset()
    item.LUTDescriptor = [len(values), first, bits]
    item.LUTData = values.astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    item["LUTDescriptor"].VR = "US"
    return Sequence([item])


@pytest.mark.parametrize(("bits", "first"), [(12, 0), (16, 50), (8, 0)])
def test_tables_also_those_that_pydicom_does_not_take(bits, first):
    entries = np.linspace(2**bits - 1, 0, 4000).round().astype(np.uint16)
    shown = entries[np.clip(TWELVE.astype(int) - first, 0, 3999)] / (2**bits - 1)
    for name in ("VOILUTSequence", "ModalityLUTSequence"):
        raw = written(TWELVE, BitsStored=12, **{name: table(entries, bits, first)})
        near(decoded(raw), shown[..., None])
        if (name, bits) in (("VOILUTSequence", 12), ("VOILUTSequence", 16)):
            own = apply_voi_lut(TWELVE, pydicom.dcmread(io.BytesIO(raw)))
            near(decoded(raw), own[..., None] / (2**bits - 1))


def test_each_frame_of_an_enhanced_file_has_its_own_scale_and_window():
    stored = np.tile(np.arange(1440, dtype=np.uint16).reshape(1, 40, 36), (3, 1, 1))
    shared, frames = Dataset(), []
    window = Dataset()
    window.WindowCenter, window.WindowWidth = 200, 101
    shared.FrameVOILUTSequence = [window]
    for slope in (1, 2, 3):
        scale, frame = Dataset(), Dataset()
        scale.RescaleSlope, scale.RescaleIntercept = slope, -10
        frame.PixelValueTransformationSequence = [scale]
        frames.append(frame)
    groups = {"SharedFunctionalGroupsSequence": [shared]}
    groups["PerFrameFunctionalGroupsSequence"] = frames
    raw = written(stored, **groups)
    for number, slope in enumerate((1, 2, 3)):
        expected = np.clip((stored[number] * float(slope) - 209.5) / 100 + 0.5, 0, 1)
        near(decoded(raw, slices=str(number)), expected[..., None])


def test_padding_is_missing_unless_every_value_is_data():
    stored = np.arange(1440, dtype=np.int16).reshape(40, 36) - 10
    raw = written(stored, PixelPaddingValue=-5)
    assert np.isnan(decoded(raw, nodata="auto")).sum() == 1
    assert np.isnan(decoded(raw, nodata="7")).sum() == 1
    assert not np.isnan(decoded(raw, nodata="none")).any()
    several = decoded(
        written(stored, PixelPaddingValue=-5, PixelPaddingRangeLimit=-10), nodata="auto"
    )
    assert np.isnan(several).sum() == 6


def test_padding_of_signed_pixels_may_be_the_unsigned_number_of_its_bits():
    stored = np.arange(1440, dtype=np.int16).reshape(40, 36) - 10
    value = DataElement(0x00280120, "US", 2**16 - 5)
    raw = written(stored, PixelPaddingValue=value, limit=DataElement(0x00280121, "US", 2**16 - 10))
    assert pydicom.dcmread(io.BytesIO(raw))["PixelPaddingValue"].value == 2**16 - 5
    assert np.isnan(decoded(raw, nodata="auto")).sum() == 6
    unsigned = written(stored.astype(np.uint16), PixelPaddingValue=2**16 - 5)
    assert np.isnan(decoded(unsigned, nodata="auto")).sum() == 1


def test_deep_values_and_floats_without_a_window_keep_their_units():
    deep = RNG.integers(0, 2**31, (40, 36)).astype(np.uint32)
    raw = written(deep, RescaleSlope=0.5, RescaleIntercept=3)
    np.testing.assert_array_equal(decoded(raw)[..., 0], (deep * 0.5 + 3).astype(np.float32))
    assert decoded(raw, window=("5e8", "1e6")).max() == 1


# --- refusals -----------------------------------------------------------------------------------


def changed(raw: bytes, syntax: str) -> bytes:
    """The file with another transfer syntax named in it."""
    dataset = pydicom.dcmread(io.BytesIO(raw))
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless])
def test_a_file_cut_anywhere_is_refused_in_words(syntax):
    raw = written(TWELVE, syntax, BitsStored=12)
    for length in range(len(raw) - 20, 140, -23):
        with pytest.raises(BadImage, match=r"truncated|damaged|was cut|does not say"):
            decoded(raw[:length])


def test_what_is_not_decoded_is_named(monkeypatch):
    raw = written(TWELVE, JPEG2000Lossless, BitsStored=12)
    with pytest.raises(BadImage, match=r"in MPEG2 Main Profile .*which is not decoded"):
        decoded(changed(raw, "1.2.840.10008.1.2.4.100"))
    decoder = pydicom.pixels.get_decoder(JPEG2000Lossless)
    monkeypatch.setattr(decoder, "_available", {})
    with pytest.raises(BadImage, match=r"in JPEG 2000 .*missing: pip install 'ssl_vit\[dicom\]'"):
        decoded(raw)


def test_sizes_are_checked_before_memory_is_taken(monkeypatch):
    raw = written(TWELVE, JPEG2000Lossless, BitsStored=12)
    small = pydicom.dcmread(io.BytesIO(raw))
    small.Rows = 12
    buffer = io.BytesIO()
    small.save_as(buffer)
    with pytest.raises(BadImage, match="a frame of 12 x 36 holds 40 x 36"):
        decoded(buffer.getvalue())
    monkeypatch.setattr("ssl_vit.data.raster.MAX_PIXELS", 40 * 36 - 1)
    with pytest.raises(BadImage, match="too large"):
        decoded(raw)


def test_without_its_library_a_dicom_says_what_to_install(tmp_path, monkeypatch):
    import importlib.util
    import sys

    raw = written(TWELVE, BitsStored=12)
    for name in ("a.dcm", "b", "c.1.2.840"):
        (tmp_path / name).write_bytes(raw)
    real, found = builtins.__import__, importlib.util.find_spec

    def without(name, *rest):
        if name.startswith("pydicom"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "ssl_vit.data.dicom", raising=False)
    monkeypatch.delattr("ssl_vit.data.dicom", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pydicom" else found(name)
    )
    with pytest.raises(BadImage, match=r"needs: pip install 'ssl_vit\[dicom\]'"):
        decode(raw, 1)
    with pytest.raises(UserError, match=r"no image; 3 images need pip install 'ssl_vit\[dicom\]'"):
        open_source(f"flat:{tmp_path}")


# --- sources ------------------------------------------------------------------------------------


def put(folder: Path, count: int = 12) -> list[np.ndarray]:
    """Files of one frame in two folders, half of them without an extension."""
    stored = [RNG.integers(0, 4096, (40, 36)).astype(np.uint16) for _ in range(count)]
    for i, pixels in enumerate(stored):
        path = folder / ("left", "right")[i % 2] / (f"1.2.840.{i:02d}" + (".dcm" if i % 4 else ""))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(written(pixels, BitsStored=12))
    return stored


def values(source: Source, channels: int) -> list[float]:
    return sorted(
        float(decode(source.read(i)[0], channels, source.reading).mean())
        for i in range(len(source))
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_and_a_shard_of_dicom_files(tmp_path, channels, caplog):
    stored = put(tmp_path / "x")
    (tmp_path / "x" / "DICOMDIR").write_bytes((SHIPPED / "dicomdirtests/DICOMDIR").read_bytes())
    (tmp_path / "x" / "left" / "plan.dcm").write_bytes((SHIPPED / "rtplan.dcm").read_bytes())
    caplog.set_level(logging.INFO)
    data = DataConfig(train=f"folder:{tmp_path / 'x'}", channels=channels, holdout=0)
    images = open_images(data, seed=0)
    assert images.train.classes == ("left", "right")
    assert images.deep
    assert images.mean[0] == pytest.approx(0.5, abs=0.02)
    assert len(images.mean) == channels
    [(name, error)] = images.survey.reasons.items()
    assert name.endswith("plan.dcm")
    assert str(error) == "holds no pixels: RT Plan Storage"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "x" / "right", "right")
    shard = open_source(f"tar:{tmp_path / 'a.tar'}")
    expected = sorted(float((pixels / 4095).mean()) for pixels in stored[1::2])
    np.testing.assert_allclose(values(shard, channels), expected, rtol=1e-5)


def test_labels_of_a_table_by_the_names_of_dicom_files(tmp_path):
    put(tmp_path / "x")
    lines = [f"1.2.840.{i:02d}{'.dcm' if i % 3 else ''},{'ab'[i % 2]}" for i in range(12)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,side", *lines]))
    reading = ReadConfig(labels=str(tmp_path / "labels.csv"))
    source = open_source(f"flat:{tmp_path / 'x'}", reading)
    assert source.classes == ("a", "b")
    assert [source.name(i).rpartition("x/")[2][0] for i in range(12)] == [
        "lr"[source.labels[i]] for i in range(12)
    ]


def test_each_frame_is_an_image_if_asked_for_and_else_one_is_said(tmp_path, caplog):
    frames = RNG.integers(0, 4096, (5, 40, 36)).astype(np.uint16)
    for i, syntax in enumerate((ExplicitVRLittleEndian, JPEG2000Lossless)):
        (tmp_path / f"{i}.dcm").write_bytes(written(frames, syntax, BitsStored=12))
    caplog.set_level(logging.INFO)
    open_source(f"flat:{tmp_path}", channels=1)
    assert "have 5 planes (frames); the middle one is read; --data.slices all" in caplog.text
    source = open_source(f"flat:{tmp_path}", ReadConfig(slices="all"), channels=1)
    assert isinstance(source, Planes)
    assert len(source) == 10
    for i in range(10):
        image = decode(source.read(i)[0], 1, source.reading)
        np.testing.assert_allclose(image[0], frames[i % 5] / 4095, rtol=1e-6)


def test_only_files_that_begin_so_are_dicom_without_an_extension(tmp_path):
    raw = written(TWELVE, ImplicitVRLittleEndian, BitsStored=12)
    assert format_of(raw[:HEAD]) == "DICOM"
    start = raw.index(b"\b\0\x16\0")  # behind preamble and file meta: SOP class UID
    for name in ("a.dcm", "b", "c.dic"):
        (tmp_path / name).write_bytes(raw[start:])
    (tmp_path / "d").write_bytes(raw)
    (tmp_path / "e.dic").write_bytes(raw)
    source = open_source(f"flat:{tmp_path}")
    assert [Path(source.name(i)).name for i in range(len(source))] == ["a.dcm", "d", "e.dic"]
    for i in range(3):
        near(decoded(source.read(i)[0]), (TWELVE / 4095)[..., None])


@pytest.mark.parametrize("window", ["auto", "40", "40 0", "40 nan", "1 2 3", ""])
def test_a_window_is_a_word_or_two_numbers(window):
    with pytest.raises(UserError, match=r"--data\.window is .*allowed: file, full, or two numbers"):
        ReadConfig(window=tuple(window.split()))
