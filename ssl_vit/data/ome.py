"""OME-TIFF sets: an image spread over several files, each of which names all of them."""

import math
from typing import Any
from xml.etree import ElementTree

import numpy as np


def lone_name(xml: str) -> str | None:
    """Name by which a file that is not part of a set calls itself; None for a set's, or none."""
    names = {element.get("FileName") for element in _elements(xml, "UUID")}
    return names.pop() if len(names) == 1 else None


def plane_count(xml: str) -> int:
    """Most planes that one of the images has, by its sizes: for which a reader makes room."""
    sizes = [[int(e.get(f"Size{axis}", 1)) for axis in "CZT"] for e in _elements(xml, "Pixels")]
    return max((math.prod(size) for size in sizes), default=0)


def own_part(xml: str, series: Any) -> tuple[str, tuple[int, ...], int] | None:
    """Axes and shape of the part of a set that is in this file, and the number of the set's files.

    ``series``: tifffile's, of the file's own pages. None if the pages are not a whole block of the
    image, or of an unknown order.
    """
    root = ElementTree.fromstring(xml)
    pixels = next((e for e in root.iter() if _is(e, "Pixels")), None)
    if pixels is None:
        return None
    axes = pixels.get("DimensionOrder", "")[:1:-1]  # slowest first, without Y and X
    samples = [int(e.get("SamplesPerPixel", 1)) for e in pixels if _is(e, "Channel")]
    sizes = [int(pixels.get(f"Size{axis}", 1)) for axis in axes]
    sizes = [
        n // max(samples[:1] or [1]) if a == "C" else n for a, n in zip(axes, sizes, strict=True)
    ]
    places, files = _own_places(pixels, root.get("UUID"), axes, sizes)
    page = series.keyframe
    if len(places) != len(series):
        return None
    order = [places[ifd] for ifd in sorted(places)]
    block = np.array(np.unravel_index(order, sizes)).T
    own = [len(set(column)) for column in block.T.tolist()]
    if math.prod(own) != len(order) or order != sorted(order):
        return None
    kept = [(axis, n) for axis, n in zip(axes, own, strict=True) if n > 1]
    names = "".join(axis for axis, _ in kept) + page.axes
    return names, (*(n for _, n in kept), *page.shape), files


def _own_places(
    pixels: ElementTree.Element, own: str | None, axes: str, sizes: list[int]
) -> tuple[dict[int, int], int]:
    """Place in the image of each of the file's own pages, and the number of files."""
    places: dict[int, int] = {}
    files = set()
    for data in (e for e in pixels if _is(e, "TiffData")):
        uuid = next((e for e in data if _is(e, "UUID")), None)
        name = None if uuid is None else (uuid.text or "").strip()
        files.add(name)
        if name != own:
            continue
        first = int(np.ravel_multi_index([int(data.get(f"First{a}", 0)) for a in axes], sizes))
        count = int(data.get("PlaneCount", data.get("NumPlanes", 1)))
        for i in range(count):
            places[int(data.get("IFD", 0)) + i] = first + i
    return places, len(files)


def _elements(xml: str, tag: str) -> list[ElementTree.Element]:
    try:
        return [e for e in ElementTree.fromstring(xml).iter() if _is(e, tag)]
    except ElementTree.ParseError:
        return []


def _is(element: ElementTree.Element, tag: str) -> bool:
    return isinstance(element.tag, str) and element.tag.rpartition("}")[2] == tag
