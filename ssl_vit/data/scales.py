"""Scale and offset that a GeoTIFF declares for its bands: value * scale + offset is in its unit.

They are items of the tag GDAL_METADATA: <Item name="SCALE" sample="0" role="scale">0.0001</Item>,
of the band of that number from 0 (GDAL, GeoTIFF driver: metadata).
"""

import logging
from collections import Counter
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np

from ssl_vit.data.base import Source
from ssl_vit.data.formats import HEAD, format_of
from ssl_vit.data.raster import BadImage, Raster

_log = logging.getLogger("ssl_vit")
METADATA = 42112  # the tag
_NAMES = ("scale", "offset")
_LOOKED = 32  # files, evenly spread over a source


def declared_scales(metadata: str) -> dict[int, tuple[float, float]]:
    """Scale and offset by band, from 0, of those bands that declare one of them.

    Raises:
        BadImage: one of them is no number.
    """
    found: dict[int, list[float]] = {}
    try:
        items = list(ElementTree.fromstring(metadata.strip("\0 \n"))) if metadata else []
        for item in items:
            role = item.get("role", "")
            if role in _NAMES and item.get("sample") is not None:
                both = found.setdefault(int(item.get("sample", "")), [1.0, 0.0])
                both[_NAMES.index(role)] = float(item.text or "")
    except (ElementTree.ParseError, ValueError) as error:
        raise BadImage(f"damaged GeoTIFF: its scales cannot be read ({error})") from error
    return {band: (scale, offset) for band, (scale, offset) in found.items()}


def scaled(raster: Raster, metadata: str, bands: Sequence[int]) -> Raster:
    """Values in the unit of the bands, float64, of a file that declares scales; else as they are.

    ``bands``: the number in the file, from 0, of each band of ``raster``.
    """
    declared = declared_scales(metadata)
    if not declared:
        return raster
    pairs = np.array([declared.get(band, (1.0, 0.0)) for band in bands])
    return Raster(raster.pixels * pairs[:, 0] + pairs[:, 1], raster.missing)


def log_scales(source: Source) -> None:
    """Log the scales that some files of a source declare, and warn where they differ."""
    count = len(source)
    looked = np.unique(np.linspace(0, max(count - 1, 0), min(count, _LOOKED)).astype(np.int64))
    seen: Counter[str] = Counter()
    for number, i in enumerate(looked.tolist()):
        kind = _scales_of(source, i)
        if kind is not None:
            seen[kind] += 1
        elif not number:
            return  # no TIFF, and most likely none at all
    shown = ", ".join(f"{kind or 'none'} in {n}" for kind, n in seen.most_common(4))
    files = f"{seen.total()} files looked at"
    if source.reading.values == "scaled":
        if seen[""]:
            _log.warning(
                f"warning: {source.spec}: {seen['']} of {files} declare no scale: with "
                "--data.values scaled their values are as stored"
            )
    elif len(seen) > 1:
        _log.warning(
            f"warning: {source.spec}: its files declare different scales of their bands ({shown}); "
            "values are as stored, and do not mean the same: --data.values scaled applies them"
        )
    elif any(seen):
        _log.info(
            f"{source.spec}: its files declare scales of their bands ({shown}); values are as "
            "stored, --data.values scaled applies them"
        )


def _scales_of(source: Source, i: int) -> str | None:
    """Scales that a file declares, for people; None for one that is no TIFF, or damaged."""
    try:
        with source.stream(i) as stream:
            if format_of(stream.read(HEAD)) != "TIFF":
                return None
            stream.seek(0)
            from ssl_vit.data.tiff import open_tiff  # which needs this module

            with open_tiff(stream) as file:
                pairs = declared_scales(file.pages.first.tags.valueof(METADATA) or "")
    except Exception:  # a bad image is one image: reading it says why
        return None
    shown = (f"{scale:g}" + (f" {offset:+g}" if offset else "") for scale, offset in pairs.values())
    return " and ".join(dict.fromkeys(shown))
