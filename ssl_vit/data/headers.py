"""Sizes by header: what an encoded image will take, known before any memory is taken for it.

Decoders allocate what a header asks for, and a header of a few bytes can ask for gigabytes.
"""

import re

from ssl_vit.data.formats import format_of

Size = tuple[int, int]


def coded_size(data: bytes | bytearray) -> Size | None:
    """Height and width of an encoded image, from its header; None if not known by it."""
    head = bytes(data[:64])
    if head[:2] == b"\xff\xd8":
        return jpeg_size(data)
    if head[:2] == b"\xff\x0a":
        return jpegxl_size(data)
    if head[:6] == b"Lerc2 ":
        at = 10 if int.from_bytes(head[6:10], "little") < 3 else 14
        return _number(data, at, 4, "little"), _number(data, at + 4, 4, "little")
    kind = format_of(head)
    if kind == "PNG":
        return _number(data, 20, 4), _number(data, 16, 4)
    if kind == "WEBP":
        return _webp_size(data)
    if kind == "JPEG2000":
        found = jpeg2000_header(data)
        return None if found is None else found[:2]
    return jpegxl_size(data) if kind == "JPEGXL" else None


def _number(data: bytes | bytearray, at: int, count: int, order: str = "big") -> int:
    return int.from_bytes(data[at : at + count], "little" if order == "little" else "big")


def jpeg_frame(raw: bytes | bytearray) -> int | None:
    """Position of a JPEG's frame header: 0xFF, marker, length (2), bits, height (2), width (2).

    Of JPEG-LS too, whose marker is 0xF7.
    """
    at = 2
    while at + 9 <= len(raw) and raw[at] == 0xFF:
        marker = raw[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return at
        else:
            at += 2 + int.from_bytes(raw[at + 2 : at + 4], "big")
    return None


def jpeg_size(raw: bytes | bytearray) -> Size | None:
    """JPEG size: height and width from the frame header; None if not found."""
    at = jpeg_frame(raw)
    return None if at is None else (_number(raw, at + 5, 2), _number(raw, at + 7, 2))


def jpeg2000_header(raw: bytes | bytearray) -> tuple[int, int, int, int, bool] | None:
    """Height, width, components, most bits and whether one is signed, of a JPEG 2000; or None.

    The SIZ segment of ISO 15444-1, A.5.1, follows the start of the code stream at once.
    """
    at = raw.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(raw) < at + 42:
        return None
    right, bottom, left, top = (_number(raw, at + 8 + 4 * i, 4) for i in range(4))
    components = _number(raw, at + 40, 2)
    depths = [raw[i] for i in range(at + 42, min(at + 42 + 3 * components, len(raw)), 3)]
    most = max([(depth & 0x7F) + 1 for depth in depths], default=0)
    return bottom - top, right - left, components, most, any(depth & 0x80 for depth in depths)


def _webp_size(data: bytes | bytearray) -> Size | None:
    """Height and width of a WebP by its first chunk: lossy, lossless or extended."""
    chunk = bytes(data[12:16])
    if chunk == b"VP8X":
        return _number(data, 27, 3, "little") + 1, _number(data, 24, 3, "little") + 1
    if chunk == b"VP8L":
        bits = _number(data, 21, 4, "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if chunk == b"VP8 ":
        return _number(data, 28, 2, "little") & 0x3FFF, _number(data, 26, 2, "little") & 0x3FFF
    return None


_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def jpegxl_size(raw: bytes | bytearray) -> Size | None:
    """Height and width of a JPEG XL (SizeHeader of ISO 18181-1); None if there is none."""
    start = 0
    if raw[:2] != b"\xff\x0a":  # in a box: the code stream itself, or the first part of it
        box = re.search(rb"jxl(?:c|p....)\xff\x0a", bytes(raw[: 1 << 20]), re.DOTALL)
        if box is None:
            return None
        start = box.end() - 2
    bits = _Bits(int.from_bytes(raw[start + 2 : start + 16], "little"))
    small = bits.take(1)
    height = _jpegxl_side(bits, small)
    ratio = bits.take(3)
    if ratio:
        times, over = _RATIOS[ratio - 1]
        return height, height * times // over
    return height, _jpegxl_side(bits, small)


class _Bits:
    """Bit reader, lowest bit first."""

    def __init__(self, value: int) -> None:
        self.value = value

    def take(self, count: int) -> int:
        found = self.value & ((1 << count) - 1)
        self.value >>= count
        return found


def _jpegxl_side(bits: _Bits, small: int) -> int:
    if small:
        return 8 * (bits.take(5) + 1)
    return bits.take((9, 13, 18, 30)[bits.take(2)]) + 1
