"""Among hundreds of images some cannot be read: the run goes on without them, and says which."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.distributed.lives import Life, Lives
from tests.integration.conftest import TINY, TINY_DINO

BAD = ("cut.jpg", "empty.jpg", "garbage.png", "bomb.png")
LARGE = "large.png"
STEPS = 10


def png_chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png_that_claims(side: int) -> bytes:
    """A valid header of a huge gray image, and the pixels of a small part of it."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def five_hundred(folder: Path, large: bool) -> None:
    """496 small images and four bad ones; ``large``: one has 10000 x 10000 pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(500 - len(BAD) - large):
        pixels = rng.integers(0, 256, (10, 10), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png", compress_level=1)
    if large:  # allowed, though Pillow warns of it
        Image.new("L", (10_000, 10_000), 99).save(folder / LARGE, compress_level=1)
    jpeg = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(jpeg, "JPEG")
    contents = jpeg.getvalue()[: len(jpeg.getvalue()) // 2], b"", b"\x89PNG no more", None
    for name, content in zip(BAD, contents, strict=True):
        (folder / name).write_bytes(png_that_claims(20_000) if content is None else content)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Life]:
    """Both methods at two numbers of workers; by two processes; by two where less is allowed."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "mae.yaml").write_text(TINY)
    (folder / "dino.yaml").write_text(TINY_DINO)
    five_hundred(folder / "for-mae", large=True)
    five_hundred(folder / "for-dino", large=False)  # its many crops of it take seconds
    lives, ended = Lives(folder), {}

    def start(name: str, method: str, *options: str, world: int = 1) -> None:
        ended[name] = lives.start(
            *(method, "--config", f"{method}.yaml", "--run.out", name, "--run.length", "2ep"),
            *("--data.train", f"flat:for-{method}"),
            *("--data.mean", "0.5", "--data.std", "0.3", "--run.probe-images", "20"),
            *("--optim.batch-size", "100", *options),
            world=world,
        )

    for method in ("mae", "dino"):
        start(f"{method} 0", method)
        start(f"{method} 2", method, "--data.workers", "2")
        ended[f"{method} 0"].wait()
        ended[f"{method} 2"].wait()
    start("two", "mae", world=2)
    ended["two"].wait()
    start("strict", "mae", "--data.max-bad", "0.006", world=2)
    ended["strict"].wait()
    return ended


def named(life: Life, rank: int = 0) -> list[str]:
    return [line for line in life.said(rank).splitlines() if "unreadable image" in line]


@pytest.mark.parametrize("name", ["mae 0", "mae 2", "dino 0", "dino 2", "two"])
def test_each_is_counted_and_named_once(runs, name):
    """In two epochs; the large image is none of them."""
    life = runs[name]
    assert set(life.wait()) == {0}, life.said()
    lines = named(life)
    assert [line.split("skipped")[0] for line in lines] == [
        f"unreadable image {i} " for i in range(1, len(BAD) + 1)
    ]
    for bad in BAD:
        assert sum(f"/{bad}: " in line for line in lines) == 1


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_what_replaces_them_is_always_the_same(runs, method):
    """At any number of workers, to the last bit of the weights."""
    runs[f"{method} 0"].wait()
    outcomes = [weights(runs, f"{method} {workers}") for workers in (0, 2)]
    assert len(outcomes[0]) > 1000
    assert outcomes[0] == outcomes[1]


def weights(runs: dict[str, Life], name: str) -> bytes:
    folder = runs[name].folder / name
    return (folder / "checkpoints" / f"step-{STEPS:08d}" / "task.safetensors").read_bytes()


def test_two_processes_count_together(runs):
    """The main process names what either has met; the other is silent."""
    assert named(runs["two"], rank=1) == []


def test_too_many_stop_the_run(runs):
    """Four of five hundred where three are allowed; each counts, whichever process met it."""
    life = runs["strict"]
    assert life.wait() == [2, 2], life.said()
    last = life.said().splitlines()[-1]
    assert last.startswith("error: 4 of 500 images of flat:for-mae are unreadable")
    assert "--data.max-bad 0.006" in last
    assert "Traceback" not in life.said() + life.said(1)
    assert "error" not in life.said(1), "all say the same; one is enough"
