"""Folders: which files are images, and what is said of the rest."""

import importlib.util
import io
import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from ssl_vit.common.errors import UserError
from ssl_vit.data import listing as listing_module
from ssl_vit.data.decode import decode
from ssl_vit.data.folder import EXTENSIONS
from ssl_vit.data.listing import Listing
from ssl_vit.data.sources import Source, open_source


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (10, 200, 30)).save(buffer, kind)
    return buffer.getvalue()


def put(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def names(source: Source, root: Path) -> list[str]:
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


@pytest.fixture
def said(caplog):
    """Opens a source, and returns it with what was said: (level, text)."""
    caplog.set_level(logging.INFO, "ssl_vit")

    def open_and_listen(spec: str) -> tuple[Source, list[tuple[int, str]]]:
        caplog.clear()
        source = open_source(spec)
        lines = [(r.levelno, r.getMessage().removeprefix(f"{spec}: ")) for r in caplog.records]
        return source, lines

    return open_and_listen


def test_every_extension_that_is_read_is_taken(tmp_path, said):
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "JPX": "JPEG2000"}
    kinds |= {"apng": "PNG", "pnm": "PPM", "dib": "BMP", "tf8": "TIFF", "ome.tif": "TIFF"}
    put(tmp_path, {f"a.{extension}": encoded(kind) for extension, kind in kinds.items()})
    source, lines = said(f"flat:{tmp_path}")
    assert len(source) == len(kinds)
    assert lines == []
    for i in range(len(source)):
        assert decode(source.read(i)[0], 3).shape == (3, 5, 6)
    assert {"jpg", "png", "tif", "npy", "heic", "jxl"} <= set(EXTENSIONS)


def test_files_of_other_names_are_told_by_their_content(tmp_path, said):
    put(tmp_path, {"a": encoded("JPEG"), "b.image": encoded("PNG"), "c.jpg": encoded("PNG")})
    put(tmp_path, {"d": b"a note", "e.dat": b"BM is no bitmap", "f.1": encoded("TIFF")})
    source, lines = said(f"flat:{tmp_path}")
    assert names(source, tmp_path) == ["a", "b.image", "c.jpg", "f.1"]
    text = "2 files are no images and were passed over: 1 without extension, 1 .dat"
    assert lines == [(logging.WARNING, text)]


def test_the_rest_is_counted_by_extension_and_said_once(tmp_path, said):
    put(tmp_path, {f"{c}/{i}.png": encoded("PNG") for c in "ab" for i in range(6)})
    put(tmp_path, {f"a/{i}.txt": b"a caption" for i in range(8)})
    put(tmp_path, {f"b/{i}.XML": b"<xml/>" for i in range(4)})
    text = "12 files are no images and were passed over: 8 .txt, 4 .xml"
    for spec in (f"folder:{tmp_path}", f"flat:{tmp_path}"):
        source, lines = said(spec)
        assert len(source) == 12
        assert lines == [(logging.WARNING, text)]


def test_a_few_files_beside_many_images_are_no_warning(tmp_path, said):
    put(tmp_path, {f"{i}.png": encoded("PNG") for i in range(20)})
    put(tmp_path, {"README.md": b"# a data set"})
    [(level, text)] = said(f"flat:{tmp_path}")[1]
    assert (level, text) == (logging.INFO, "1 file is no image and was passed over: 1 .md")
    put(tmp_path, {"LICENSE.txt": b"as you like"} | {f"b{i}.png": b"" for i in range(180)})
    assert said(f"flat:{tmp_path}")[1][0][0] == logging.INFO
    (tmp_path / "b0.png").unlink()
    assert said(f"flat:{tmp_path}")[1][0][0] == logging.WARNING


def test_leavings_of_storage_boxes_archives_and_desktops_are_nothing(tmp_path, said):
    image = encoded("PNG")
    put(tmp_path, {"cat/a.png": image, "dog/b.png": image})
    put(tmp_path, {"cat/@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg": image, "@eaDir/c.jpg": image})
    put(tmp_path, {"__MACOSX/cat/._a.png": b"\0\5\26\7", "cat/._a.png": b"\0\5\26\7"})
    put(tmp_path, {".DS_Store": b"\0", "cat/Thumbs.db": b"\xd0\xcf", "dog/desktop.ini": b"["})
    put(tmp_path, {".ipynb_checkpoints/a-checkpoint.png": image, "#recycle/d.png": image})
    for spec in (f"folder:{tmp_path}", f"flat:{tmp_path}"):
        source, lines = said(spec)
        assert names(source, tmp_path) == ["cat/a.png", "dog/b.png"]
        assert lines == []
    assert open_source(f"folder:{tmp_path}").classes == ("cat", "dog")


def test_raw_data_and_files_in_the_making_are_passed_over(tmp_path, said):
    """They begin like images: a reader of TIFF finds a thumbnail in the former."""
    put(tmp_path, {"a.png": encoded("PNG"), "b.dng": encoded("TIFF"), "c.NEF": encoded("TIFF")})
    put(tmp_path, {"d.jpg.part": encoded("JPEG"), "e.png.crdownload": encoded("PNG")})
    source, [(level, text)] = said(f"flat:{tmp_path}")
    assert names(source, tmp_path) == ["a.png"]
    assert level == logging.WARNING
    assert text.endswith("passed over: 1 .crdownload, 1 .dng, 1 .nef, 1 .part")


def test_heic_without_its_library_is_named_with_the_remedy(tmp_path, said, monkeypatch):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    put(tmp_path, {"a.png": encoded("PNG"), "b.heic": heic, "c.HEIF": heic, "d": heic})
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pillow_heif" else real(name)
    )
    source, lines = said(f"flat:{tmp_path}")
    assert names(source, tmp_path) == ["a.png"]
    text = "3 images need pip install 'ssl_vit[heif]' and were left out: "
    assert lines == [(logging.WARNING, text + "1 without extension, 1 .heic, 1 .heif")]
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"holds no image; 3 images need pip install"):
        open_source(f"flat:{tmp_path}")


def test_a_folder_without_an_image_says_what_it_holds(tmp_path):
    with pytest.raises(UserError, match="holds no image; looked for files in jpg, jpeg"):
        open_source(f"flat:{tmp_path}")
    put(tmp_path, {"a.csv": b"a,b", "b.csv": b"a,b", "c.tar": b"\0"})
    with pytest.raises(UserError, match=r"holds no image; 3 files .*: 2 \.csv, 1 \.tar"):
        open_source(f"flat:{tmp_path}")


def test_what_cannot_be_opened_is_not_waited_for(tmp_path, said):
    put(tmp_path, {"a.png": encoded("PNG")})
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    source, [(_, text)] = said(f"flat:{tmp_path}")
    assert len(source) == 1
    assert text.endswith("2 without extension")


def test_files_that_are_opened_are_bounded(tmp_path, monkeypatch):
    """Text, tables and archives are not; nor others once many of their extension are no images."""
    monkeypatch.setattr(listing_module, "_LOOKS", 5)
    opened: list[str] = []
    real = open

    def counted(path, *rest, **options):
        opened.append(os.fsdecode(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(listing_module, "open", counted, raising=False)
    put(tmp_path, {f"{i:02d}.{e}": b"none" for i in range(20) for e in ("txt", "json", "dat")})
    put(tmp_path, {f"{i:02d}.im": encoded("PNG") for i in range(20)})
    put(tmp_path, {f"{i:02d}.png": encoded("PNG") for i in range(20)})
    listing = Listing("flat:x")
    assert len(list(listing.walk(os.fsencode(tmp_path)))) == 40
    kinds = [name.rpartition(".")[2] for name in opened]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"dat": 5, "im": 20}
    assert listing.passed.total() == 60


def test_the_listing_does_not_depend_on_the_file_system(tmp_path):
    """Sorted by bytes, a folder's own images first, whatever was told by content."""
    put(tmp_path, {name: encoded("PNG") for name in ("z.png", "B", "a.png", "k/b.png", "k/A")})
    assert names(open_source(f"flat:{tmp_path}"), tmp_path) == [
        *("B", "a.png", "z.png", "k/A", "k/b.png")
    ]
