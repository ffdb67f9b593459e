"""Image formats: by the first bytes of a file, and by the extension of its name."""

EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jif", "jfif", "png", "apng", "bmp", "dib", "gif", "webp"),
    *("tif", "tiff", "btf", "tf8", "lsm", "stk", "npy"),
    *("ppm", "pgm", "pbm", "pnm", "pfm"),
    *("avif", "heic", "heif", "hif", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "jxl"),
    *("dcm", "dicom"),
)
"""Extensions by which a file is taken for an image; what it is, its content says."""

HEAD = 132
"""Bytes from a file's start by which its format is known."""

_ISO = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"),
    "HEIF",
)
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\x93NUMPY", "NPY"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEGXL"),
)
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)


def format_of(head: bytes) -> str:
    """Format of a file that starts with ``head``, at least ``HEAD`` bytes; empty if unknown.

    Two bytes are too few to tell an image from other data: of BMP and PPM more is compared, and
    the bare form of JPEG XL is known by the extension only.
    """
    if head[128:132] == b"DICM":  # behind 128 bytes of any kind, often a TIFF's
        return "DICOM"
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _iso_format(head)
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    netpbm = head[:1] == b"P" and head[1:2] in b"123456fF" and head[2:3].isspace()
    return "PPM" if netpbm and (head[3:4].isdigit() or head[3:4] == b"#") else ""


def _iso_format(head: bytes) -> str:
    """AVIF or HEIF by the brands in the first box of an ISO media file; empty for a video."""
    size = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [bytes(head[8:12]), *(bytes(head[i : i + 4]) for i in range(16, size, 4))]
    found = _ISO.get(brands[0], "")
    return "AVIF" if found and "AVIF" in [_ISO.get(brand) for brand in brands] else found
