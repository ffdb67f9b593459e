"""Images as other libraries write them, of any layout: their values, or a refusal in words.

Hypothesis draws what is written, the same every time: 150 images for each of four libraries, or as
many as the environment's SSL_VIT_FUZZ says.
"""

import io
import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.decode import BadImage, decode

FUZZ = int(os.environ.get("SSL_VIT_FUZZ", "150"))
EVERY = settings(
    max_examples=FUZZ,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
SEEN: Counter[str] = Counter()
INTEGERS = ("u1", "i1", "u2", "i2", "u4", "i4")
FLOATS = ("f2", "f4", "f8")
# A refusal that gives the name of an exception has not understood its image.
UNCLEAR = re.compile(r"^\w*(Error|Exception|Warning)\b")


def pixels(draw: Any, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values over the whole range of a dtype, both ends and runs of equal ones among them."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = np.dtype(dtype)
    if kind.kind == "b":
        return random.random(shape) < 0.5
    if kind.kind == "f":
        return random.normal(0, 10.0 ** random.integers(-3, 4), shape).astype(kind)
    ends = np.iinfo(kind)
    high = draw(st.sampled_from([ends.max, min(ends.max, 4095), min(ends.max, 3)]))
    low = draw(st.sampled_from([ends.min, 0]))
    values = random.integers(low, high, shape, dtype=np.int64, endpoint=True).astype(kind)
    if draw(st.booleans()):
        values[: shape[0] // 2] = ends.max
    return values


def as_decoded(values: np.ndarray, channels: int) -> np.ndarray:
    """Values (H, W, C) of a file as the documentation says that they are read: (channels, H, W)."""
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        values = values.astype(np.float32) / np.float32(65535)
    elif values.dtype != np.uint8:
        values = values.astype(np.float32)
    if values.shape[2] == 1:
        values = np.repeat(values, channels, axis=2)
    return values.transpose(2, 0, 1)


def decoded(raw: bytes, channels: int, **reading: str) -> np.ndarray | None:
    """The image; None where it is refused in words."""
    try:
        found = decode(raw, channels, ReadConfig(**reading)).numpy()
    except BadImage as refused:
        if UNCLEAR.match(str(refused)):
            raise
        SEEN["refused"] += 1
        return None
    SEEN["compared"] += 1
    return found


def check(raw: bytes, values: np.ndarray, channels: int, **reading: str) -> None:
    """Equal to the values, or refused in words."""
    found = decoded(raw, channels, **reading)
    if found is None:
        return
    expected = as_decoded(values, channels)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


# --- tifffile -----------------------------------------------------------------------------------

LOSSLESS = ("none", "lzw", "zlib", "zstd", "lzma", "packbits", "webp", "lerc", "jpeg2000", "jpegxl")
_OPTIONS = {"webp": {"lossless": True}, "jpeg2000": {"level": 0}, "jpegxl": {"lossless": True}}


@dataclass
class Layout:
    """How an image is stored: names of ``tifffile.imwrite``."""

    values: np.ndarray
    options: dict[str, Any]
    planar: bool


@st.composite
def layouts(draw: Any) -> Layout:
    dtype = draw(st.sampled_from(("?", *INTEGERS, *FLOATS)))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    bands = draw(st.integers(1, 6))
    planar = bands > 1 and draw(st.booleans())
    colour = draw(st.sampled_from(("minisblack", "miniswhite", "rgb")))
    options: dict[str, Any] = {
        "photometric": colour if bands == 1 or colour == "rgb" else "minisblack"
    }
    if colour == "rgb" and bands < 3:
        options["photometric"] = "minisblack"
    compression = draw(st.sampled_from(LOSSLESS))
    options["compression"] = None if compression == "none" else compression
    options["compressionargs"] = _OPTIONS.get(compression)
    if compression in ("lzw", "zlib", "zstd", "lzma") and dtype != "?" and draw(st.booleans()):
        options["predictor"] = 3 if np.dtype(dtype).kind == "f" else 2
    if draw(st.booleans()):
        options["tile"] = (draw(st.sampled_from((16, 32))), draw(st.sampled_from((16, 48))))
    elif draw(st.booleans()):
        options["rowsperstrip"] = draw(st.integers(1, height))
    options["byteorder"] = draw(st.sampled_from("<>"))
    options["bigtiff"] = draw(st.booleans())
    if draw(st.booleans()):
        options["metadata"] = None
    if bands > 1:
        options["planarconfig"] = "separate" if planar else "contig"
        extra = bands - (3 if options["photometric"] == "rgb" else 1)
        if extra and draw(st.booleans()):
            kinds = st.sampled_from(("unspecified", "assocalpha", "unassalpha"))
            options["extrasamples"] = [draw(kinds)] + ["unspecified"] * (extra - 1)
    return Layout(pixels(draw, dtype, (height, width, bands)), options, planar)


@EVERY
@given(layouts())
def test_tifffiles_images(layout):
    """Its own reading is what was written, and ours its values, black as zero."""
    box, values = io.BytesIO(), layout.values
    stored = values[..., 0] if values.shape[2] == 1 else values
    stored = stored.transpose(2, 0, 1) if layout.planar else stored
    try:
        tifffile.imwrite(box, stored, **layout.options)
        theirs = tifffile.imread(io.BytesIO(box.getvalue()))
    except Exception:  # a codec that has no such dtype or layout
        return
    if not np.array_equal(theirs, stored):  # a codec that keeps less
        return
    if layout.options["photometric"] == "miniswhite":
        if values.dtype.kind == "f":
            return  # has no largest value; kept, as is said elsewhere
        values = ~values
    bands = values.shape[2]
    check(box.getvalue(), values, bands)
    if bands == 1:
        check(box.getvalue(), values, 3)


# --- rasterio -----------------------------------------------------------------------------------


@st.composite
def rasters(draw: Any) -> tuple[np.ndarray, dict[str, Any], float | None]:
    dtype = draw(st.sampled_from(("u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8")))
    shape = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 6))
    values = pixels(draw, dtype, shape)
    names = ("none", "lzw", "deflate", "zstd", "packbits", "lzma", "lerc", "lerc_deflate", "webp")
    compress = draw(st.sampled_from(names))
    interleave = draw(st.sampled_from(("pixel", "band")))
    options: dict[str, Any] = {"compress": compress, "interleave": interleave}
    if shape[2] != 3:  # else GDAL takes the fourth band for opacity, and its zeros for no data
        options["photometric"] = "minisblack"
    if compress == "webp":
        options["WEBP_LOSSLESS"] = True
    if compress in ("lzw", "deflate", "zstd") and draw(st.booleans()):
        options["predictor"] = 3 if values.dtype.kind == "f" else 2
    if draw(st.booleans()):
        options |= {"tiled": True, "blockxsize": 16, "blockysize": 32}
    if draw(st.booleans()):
        options["bigtiff"] = "yes"
    if draw(st.booleans()):
        options["sparse_ok"] = True
    nodata = None
    if draw(st.booleans()):
        nodata = draw(st.sampled_from((0.0, 255.0, -9999.0, float(values.flat[0]))))
        ends = np.iinfo(values.dtype) if values.dtype.kind in "iu" else None
        if ends and not ends.min <= nodata <= ends.max:
            nodata = float(ends.max)
    return values, options, nodata


@EVERY
@given(rasters())
def test_rasterios_images(drawn):
    """What it declares to be no data is missing; all else has the values that it reads itself."""
    values, options, nodata = drawn
    height, width, bands = values.shape
    with warnings.catch_warnings(), rasterio.MemoryFile() as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with memory.open(
                driver="GTiff",
                height=height,
                width=width,
                count=bands,
                dtype=values.dtype,
                nodata=nodata,
                **options,
            ) as file:
                file.write(values.transpose(2, 0, 1))
            with memory.open() as file:
                theirs = file.read(masked=True)
        except (rasterio.errors.RasterioError, ValueError):
            return  # a codec that has no such dtype or layout
        raw = bytes(memory.getbuffer())
    stored = np.ma.getdata(theirs).transpose(1, 2, 0)
    if not np.array_equal(stored, values):
        return
    check(raw, values, bands, nodata="none")
    missing = np.ma.getmaskarray(theirs)
    if not missing.any():
        check(raw, values, bands)
        return
    found = decoded(raw, bands)
    if found is None:
        return
    np.testing.assert_array_equal(np.isnan(found), missing)
    expected = as_decoded(values, bands).astype(np.float32)
    expected = expected / np.float32(255) if values.dtype == np.uint8 else expected
    np.testing.assert_allclose(found[~missing], expected[~missing], rtol=1e-6)


# --- Pillow and NumPy ---------------------------------------------------------------------------

_MODES = {"1": "?", "L": "u1", "LA": "u1", "RGB": "u1", "RGBA": "u1", "I;16": "u2", "F": "f4"}
_BANDS = {"LA": 2, "RGB": 3, "RGBA": 4}
_FORMATS = {
    "PNG": ("1", "L", "LA", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "RGB", "RGBA", "I;16", "F"),
    "BMP": ("1", "L", "RGB"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "JPEG2000": ("L", "RGB", "I;16"),
    "GIF": ("L",),
}


@st.composite
def pictures(draw: Any) -> tuple[str, str, np.ndarray]:
    kind = draw(st.sampled_from(sorted(_FORMATS)))
    mode = draw(st.sampled_from(_FORMATS[kind]))
    shape = draw(st.integers(1, 40)), draw(st.integers(1, 40)), _BANDS.get(mode, 1)
    return kind, mode, pixels(draw, _MODES[mode], shape)


@EVERY
@given(pictures())
def test_pillows_images(drawn):
    """Gray is repeated, opacity dropped, where colour is asked for."""
    kind, mode, values = drawn
    made = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    box = io.BytesIO()
    options = {"WEBP": {"lossless": True, "exact": True}, "JPEG2000": {"irreversible": False}}
    made.save(box, kind, **options.get(kind, {}))
    colours = values[..., : 3 if mode == "RGBA" else 1 if mode == "LA" else None]
    check(box.getvalue(), colours, 3)
    if mode in ("LA", "RGBA") and kind != "GIF":
        check(box.getvalue(), values, values.shape[2])
    if values.shape[2] == 1:
        check(box.getvalue(), values, 1)


@EVERY
@given(st.data())
def test_numpys_images(data):
    """Channels last or first."""
    draw = data.draw
    dtype = draw(st.sampled_from(("?", *INTEGERS, *FLOATS, "i8", "u8")))
    shape = draw(st.integers(7, 40)), draw(st.integers(7, 40)), draw(st.integers(1, 6))
    values = pixels(draw, dtype.replace("8", "4"), shape).astype(dtype)
    box = io.BytesIO()
    first = draw(st.booleans())
    np.save(box, values.transpose(2, 0, 1) if first else values)
    check(box.getvalue(), values, shape[2])


def test_most_images_are_compared():
    """After the others: of what is drawn and can be written, few are refused."""
    assert SEEN["compared"] >= 2 * FUZZ
    assert SEEN["refused"] <= 0.05 * SEEN["compared"]


pytestmark = pytest.mark.filterwarnings("ignore")
