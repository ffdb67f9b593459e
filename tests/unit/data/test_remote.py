"""Shards of the network: fetched once, exact, bounded, through lost connections and kills."""

import io
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from launch import slurm
from ssl_vit import pretrain
from ssl_vit.common.errors import RunFailed, UserError
from ssl_vit.common.reading import DataConfig, ReadConfig
from ssl_vit.data import remote, remote_tar
from ssl_vit.data.augment import Crop, ViewSpec
from ssl_vit.data.base import Source, split_holdout
from ssl_vit.data.batch import Batch
from ssl_vit.data.fingerprint import fingerprint
from ssl_vit.data.images import open_images
from ssl_vit.data.loader import TrainImages, train_batches
from ssl_vit.data.remote import RemoteFile, describe
from ssl_vit.data.shard_cache import ShardCache, open_shard_cache
from ssl_vit.data.shard_order import order_of
from ssl_vit.data.sources import open_source
from tests.unit.data.file_server import Files, serving
from tests.unit.data.test_sources import write_tar

pytest.importorskip("aiohttp")
SHARDS, EACH = 6, 8
SPEC = ViewSpec((Crop((8, 8), scale=(0.5, 1.0)),))
FORK = multiprocessing.get_context("fork")


def photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """Six shards of eight photographs with labels, and one that is larger."""
    folder = tmp_path_factory.mktemp("shards")
    for s in range(SHARDS):
        members = {}
        for i in range(EACH):
            members[f"{s}-{i}.png"] = photo(100 * s + i)
            members[f"{s}-{i}.cls"] = str(i % 3).encode()
        write_tar(folder / f"t-{s}.tar", members)
    write_tar(folder / "big.tar", {f"{i}.png": os.urandom(1 << 16) for i in range(16)})
    return folder


@pytest.fixture
def server(local):
    with serving({path.name: path.read_bytes() for path in local.glob("*.tar")}) as files:
        yield files


@pytest.fixture(autouse=True)
def fast(tmp_path_factory, monkeypatch, caplog):
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01, 0.01, 0.01))
    remote._opened.cache_clear()
    caplog.set_level(logging.INFO)


def reading(folder: Path, shards: float = 1000, window: int = 0) -> DataConfig:
    """Options of a cache for this many small shards."""
    size = shards * 20480 * 1e-9  # bytes of one shard, in GB
    return DataConfig(shard_cache=str(folder), shard_cache_size=size, shard_window=window)


def cached(folder: Path) -> int:
    """Bytes of shards in a cache, complete or not."""
    with os.scandir(folder / "shards") as there:
        own = [p.path for p in there if p.name.endswith((".tar", ".partial"))]
    return sum(os.path.getsize(path) for path in own if os.path.exists(path))


def batches(source: Source, window: int = 0, workers: int = 0, steps: int = 12) -> list[Batch]:
    images = TrainImages(source, SPEC, channels=3, seed=1)
    order = order_of(source, window, 6, 1)
    return list(train_batches(images, order, 0, steps, workers, pin=False))


def same(a: Batch, b: Batch) -> bool:
    pairs = [*zip(a.views.crops, b.views.crops, strict=True)]
    pairs += [(a.views.keys, b.views.keys), (a.views.labels, b.views.labels)]
    return a.bad == b.bad == {} and all(torch.equal(x, y) for x, y in pairs)


def all_same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


# --- the same as shards on a disk ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_are_those_of_the_same_shards_on_a_disk(server, local, tmp_path):
    """Labels, names, fingerprint and batches, without and with workers; each shard is sent once."""
    here = open_source(f"tar:{local}/t-{{0..5}}.tar")
    there = open_source(f"{server.url}/t-{{0..5}}.tar", reading(tmp_path))
    assert there.labels.tolist() == here.labels.tolist()
    assert there.classes == here.classes
    assert there.name(9) == f"{server.url}/t-1.tar:1-1"
    assert fingerprint(there) == fingerprint(here)
    wanted = batches(here)
    assert all_same(wanted, batches(there))
    assert all_same(wanted, batches(there, workers=2))
    sizes = {p.name: p.stat().st_size for p in local.glob("t-*.tar")}
    assert {name: server.sent[name] for name in sizes} == sizes


def test_a_window_of_shards_in_a_cache_that_holds_half_of_them(server, local, tmp_path):
    """The batches are those of local shards in the same order; the cache keeps its bound."""
    most = 3.5
    there = open_source(f"{server.url}/t-{{0..5}}.tar", reading(tmp_path, most, window=1))
    train, held = split_holdout(there, 4, 0)
    here, held_here = split_holdout(open_source(f"tar:{local}/t-{{0..5}}.tar"), 4, 0)
    images = TrainImages(train, SPEC, channels=3, seed=1)
    found, sizes = [], [cached(tmp_path)]
    for batch in train_batches(images, order_of(train, 1, 6, 1), 0, 15, 0, pin=False):
        found.append(batch)
        sizes.append(cached(tmp_path))
    assert all_same(batches(here, window=1, steps=15), found)
    assert max(sizes) <= most * 20480
    assert [held.read(i) for i in range(4)] == [held_here.read(i) for i in range(4)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_share_a_cache_that_holds_half_of_the_shards(server, local, tmp_path):
    there = open_source(f"{server.url}/t-{{0..5}}.tar", reading(tmp_path, 3.5, window=1))
    here = open_source(f"tar:{local}/t-{{0..5}}.tar")
    assert all_same(batches(here, window=1), batches(there, window=1, workers=2))
    assert cached(tmp_path) <= 3.5 * 20480


def test_next_shards_are_fetched_while_these_are_read(server, tmp_path):
    source = open_source(f"{server.url}/t-{{0..5}}.tar", reading(tmp_path, 3.5))
    source.expect([0, EACH])
    for _ in range(200):
        if all(source.cache.has(source.files[s]) for s in (0, 1)):
            return
        time.sleep(0.02)
    raise AssertionError("they were not fetched")


def test_single_images_of_shards_that_are_not_there_are_read_by_ranges(
    server, local, tmp_path, monkeypatch
):
    """So a few images cost a few requests; a shard that is read in a row is fetched."""
    spec, options = f"{server.url}/t-{{0..5}}.tar", reading(tmp_path, 3.5)
    open_source(spec, options)
    monkeypatch.setattr(ShardCache, "has", lambda *_: False)
    source = open_source(spec, options)
    here = open_source(f"tar:{local}/t-{{0..5}}.tar")
    before = sum(server.sent.values())
    assert [source.read(i) for i in range(0, 48, 8)] == [here.read(i) for i in range(0, 48, 8)]
    sent = sum(server.sent.values()) - before
    assert sent == sum(int(source.sizes[i]) for i in range(0, 48, 8))
    monkeypatch.undo()
    monkeypatch.setattr(remote_tar, "_IN_A_ROW", 3)
    absent = next(s for s in range(SHARDS) if not source.cache.has(source.files[s]))
    for i in range(absent * EACH, absent * EACH + 4):
        source.read(i)
    assert source.cache.has(source.files[absent])


def test_a_later_start_fetches_nothing_whose_index_is_known(server, tmp_path):
    """Of a cache that holds all, nothing; where it holds half of them, the images looked at."""
    spec = f"{server.url}/t-{{0..5}}.tar"
    for folder, shards in (("all", 7.0), ("half", 3.5)):
        options = reading(tmp_path / folder, shards)
        open_source(spec, options)
        before = sum(server.sent.values())
        assert len(open_source(spec, options)) == SHARDS * EACH
        assert sum(server.sent.values()) - before < 20480 * (folder == "half") + 1


def indexed(server: Files, local: Path, names: dict[str, str]) -> None:
    """Put the indexes of local shards on the server, under other names."""
    open_source(f"tar:{local}/t-{{0..5}}.tar")
    for path in local.glob("t-*.npz"):
        name = names.get(path.name[:3], path.name[:3]) + path.name[3:]
        server.files[name] = path.read_bytes()
        server.sent[name], server.starts[name] = 0, []


@pytest.mark.parametrize("ranges", [True, False])
def test_indexes_on_the_server_spare_the_first_pass(server, local, tmp_path, ranges):
    """Where the cache holds few shards; they are compared with what is fetched."""
    indexed(server, local, {})
    server.ranges = ranges
    there = open_source(f"{server.url}/t-{{0..5}}.tar", reading(tmp_path, 3.5, window=1))
    here = open_source(f"tar:{local}/t-{{0..5}}.tar")
    assert there.given >= set(range(1, SHARDS))  # the first shard's first image was looked at
    whole = sum(server.sent[f"t-{s}.tar"] == 20480 for s in range(SHARDS))
    assert whole == 0 or not ranges
    assert there.labels.tolist() == here.labels.tolist()
    assert all_same(batches(here, window=1), batches(there, window=1))
    assert not there.given


def test_an_index_of_another_shard_is_found_out(server, local, tmp_path):
    indexed(server, local, {"t-1": "t-2", "t-2": "t-1"})
    source = open_source(f"{server.url}/t-{{0..5}}.tar", reading(tmp_path, 3.5))
    source.expect([EACH])
    with pytest.raises(RunFailed, match=r"index http\S+/t-1.tar.ssl_vit.npz is not of this shard"):
        source.read(EACH)


# --- the cache ----------------------------------------------------------------------------------


def test_the_least_recently_used_shard_goes(server, tmp_path):
    cache = open_shard_cache(reading(tmp_path, 2.5))
    files = [describe(f"{server.url}/t-{s}.tar") for s in range(3)]
    for file in files[:2]:
        cache.fetch(file)
    os.utime(cache.path(files[0]), (time.time() + 60, 1))
    cache.fetch(files[2])
    assert [cache.has(file) for file in files] == [True, False, True]


def test_a_shard_that_does_not_fit_is_refused_with_the_remedy(server, tmp_path):
    cache = open_shard_cache(reading(tmp_path, 0.5))
    with pytest.raises(UserError, match=r"t-0.tar has 0.0205 MB: .* raise --data.shard-cache-size"):
        cache.fetch(describe(f"{server.url}/t-0.tar"))
    full = ReadConfig(shard_cache=str(tmp_path), cache_reserve=1e9)
    with pytest.raises(UserError, match=r"the disk of .*--data.cache-reserve keeps 1,000,000,000"):
        open_shard_cache(full).fetch(describe(f"{server.url}/t-0.tar"))


def test_training_on_more_than_the_cache_holds_needs_a_window(server, tmp_path):
    data = reading(tmp_path, 3.5)
    data = DataConfig(**{**vars(data), "train": f"{server.url}/t-{{0..5}}.tar"})
    with pytest.raises(UserError, match=r"but its shards take .* --data.shard-window 1: shards"):
        open_images(data, 0)
    assert sum(server.sent.values()) == 0  # it is said before shards are fetched
    wide = DataConfig(**{**vars(data), "shard_window": 2})
    with pytest.raises(
        UserError, match=r"shard-window is 2, and three times .* or give --data.shard-window 1$"
    ):
        open_images(wide, 0)
    held_out = DataConfig(**{**vars(data), "train": "digits", "val": data.train, "channels": 3})
    assert len(open_images(held_out, 0).val) == SHARDS * EACH


def fetch_all(url: str, folder: Path) -> None:
    open_source(f"{url}/t-{{0..5}}.tar", reading(folder))


def test_two_processes_share_one_cache(server, local, tmp_path):
    """Each shard is sent once, and both have all."""
    server.pause = 0.25  # so that both are at it at the same time
    both = [FORK.Process(target=fetch_all, args=(server.url, tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert [server.sent[f"t-{s}.tar"] for s in range(SHARDS)] == [
        (local / f"t-{s}.tar").stat().st_size for s in range(SHARDS)
    ]
    assert cached(tmp_path) == sum(server.sent.values())


# --- lost connections, kills, changes -----------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_lost_connections_are_tried_again(server, local, tmp_path, monkeypatch, ranges):
    """From where they were lost; without ranges from the beginning."""
    monkeypatch.setattr(remote, "CHUNK", 1 << 18)
    server.ranges, server.lose = ranges, 3
    cache = open_shard_cache(reading(tmp_path))
    path = cache.fetch(describe(f"{server.url}/big.tar"))
    assert path is not None
    assert path.read_bytes() == (local / "big.tar").read_bytes()
    assert server.lose == 0
    assert (max(server.starts["big.tar"]) > 0) == ranges


def test_a_server_without_ranges_serves_all_the_same(server, local, tmp_path):
    """Of a cache that holds few shards, too: they are then fetched whole."""
    server.ranges = False
    source = open_source(f"{server.url}/t-{{0..5}}.tar", reading(tmp_path, 3.5))
    here = open_source(f"tar:{local}/t-{{0..5}}.tar")
    assert all(source.read(i) == here.read(i) for i in range(0, 48, 5))


def test_a_connection_that_is_lost_for_good_is_one_line(server, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(remote, "_QUIET", 0.01)
    file = describe(f"{server.url}/t-0.tar")
    server.down = True
    with pytest.raises(RunFailed, match=r"t-0.tar cannot be read, .*: \w+") as caught:
        open_shard_cache(reading(tmp_path)).fetch(file)
    assert "\n" not in str(caught.value)
    assert caplog.text.count("trying again in 0.01 seconds") == 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_worker_that_loses_the_server_ends_the_run_in_one_line(server, tmp_path):
    source = open_source(f"{server.url}/t-{{0..5}}.tar", reading(tmp_path, 3.5, window=1))
    server.down = True
    with pytest.raises(RunFailed, match=r"^http.*t-\d.tar cannot be read") as caught:
        batches(source, window=1, workers=1)
    assert "\n" not in str(caught.value)


def fetch_big(url: str, folder: Path) -> None:
    open_shard_cache(reading(folder)).fetch(describe(f"{url}/big.tar"))


def test_a_killed_download_goes_on_where_it_ended(server, local, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 1 << 17)
    server.pause = 0.02
    process = FORK.Process(target=fetch_big, args=(server.url, tmp_path))
    process.start()
    partial = []
    while process.is_alive() and not (partial and partial[0].stat().st_size):
        partial = list((tmp_path / "shards").glob("*.partial")) if tmp_path.exists() else []
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = partial[0].stat().st_size
    assert 0 < done < (local / "big.tar").stat().st_size
    server.pause, server.starts["big.tar"] = 0.0, []
    cache = open_shard_cache(reading(tmp_path))
    path = cache.fetch(describe(f"{server.url}/big.tar"))
    assert path is not None
    assert path.read_bytes() == (local / "big.tar").read_bytes()
    assert min(server.starts["big.tar"]) == done


def test_other_shards_at_the_same_address_are_told(server, local, tmp_path, caplog):
    spec = f"{server.url}/t-{{0..1}}.tar"
    before = open_source(spec, reading(tmp_path))
    server.files["t-1.tar"] = (local / "t-5.tar").read_bytes()
    now = open_source(spec, reading(tmp_path))
    assert "1 of 2 shards are not those on the server before (the first: http" in caplog.text
    assert fingerprint(now) != fingerprint(before)
    assert now.read(EACH)[0] == open_source(f"tar:{local}/t-5.tar").read(0)[0]
    before.cache.path(before.files[1]).unlink()
    before._files.clear()
    with pytest.raises(RunFailed, match=r"t-1.tar was changed on the server in the meantime"):
        before.read(EACH)


# --- what is refused ----------------------------------------------------------------------------


def test_what_is_not_there_or_not_allowed_is_a_user_error(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there is no shard http.*/t-6.tar"):
        open_source(f"{server.url}/t-{{5..9}}.tar")
    server.password = "sesame"
    with pytest.raises(UserError, match=r"denied; a name and password can be in ~/.netrc"):
        open_source(f"{server.url}/t-0.tar")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password sesame\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert len(open_source(f"{server.url}/t-0.tar", reading(tmp_path))) == EACH
    netrc.unlink()
    key = {"Authorization": "Basic bWU6c2VzYW1l"}  # as FSSPEC_HTTP sets it
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": key})
    remote._opened.cache_clear()
    assert len(open_source(f"{server.url}/t-1.tar", reading(tmp_path))) == EACH


def test_damaged_and_compressed_shards_are_named_by_their_address(server, tmp_path):
    server.files["t-0.tar"] = server.files["t-0.tar"][:3000]
    with pytest.raises(UserError, match=r"the shard http\S+/t-0.tar is truncated or damaged"):
        open_source(f"{server.url}/t-0.tar", reading(tmp_path))
    server.files["t-1.tar"] = b"\x1f\x8b" + bytes(100)
    with pytest.raises(UserError, match=r"http\S+/t-1.tar is compressed"):
        open_source(f"{server.url}/t-1.tar", reading(tmp_path))


def test_a_library_that_is_not_installed_is_named_with_the_command(monkeypatch):
    def lacking(scheme: str) -> None:
        raise ImportError(scheme)

    monkeypatch.setattr(fsspec, "get_filesystem_class", lacking)
    remote._opened.cache_clear()
    with pytest.raises(UserError, match=r"s3:// needs s3fs: pip install -e '.\[remote\]'"):
        open_source("s3://bucket/t.tar")


@pytest.mark.parametrize(
    "spec",
    [
        "https://me:HIDDEN@host/t.tar",
        "tar:https://HIDDEN@host:8080/t.tar",
        "kept:s3://KEY:HID/DEN@bucket/t-{0..9}.tar",
        "s3://KEY:1/HIDDEN@bucket/t-{0..9}.tar",
        "https://host/t.tar?X-Amz-Signature=HIDDEN",
    ],
)
def test_secrets_in_addresses_are_refused_and_not_shown(spec):
    door = ["mae", "--data.train"]
    ways = [
        open_source,
        lambda spec: DataConfig(train=spec),
        lambda spec: pretrain.parse_options([*door, spec]),
        lambda spec: slurm.main(["--dry-run", "--", "pretrain", *door, spec]),
    ]
    for way in ways:
        with pytest.raises(UserError, match=r"give it without") as caught:
            way(spec)
        assert "HID" not in str(caught.value)
        assert "KEY" not in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["http://host:80/a@b/t.tar", "s3://bucket/a@b-?.tar", "tar:/a@b:c"]
)
def test_marks_of_secrets_elsewhere_are_none(spec):
    DataConfig(train=spec)


def test_errors_of_a_redirected_answer_show_no_signature():
    def fails() -> None:
        raise ConnectionResetError("lost https://store/x?sig=HIDDEN, of x")

    with pytest.raises(RunFailed, match=r"lost https://store/x of x$") as e:
        remote.patiently(fails, "https://host/x.tar", (), time.sleep)
    assert "HIDDEN" not in str(e.value)


def test_versions_are_told_apart_by_address_version_and_size():
    files = [RemoteFile("s3://a/t.tar", 1, "x"), RemoteFile("s3://b/t.tar", 1, "x")]
    files += [RemoteFile("s3://a/t.tar", 2, "x"), RemoteFile("s3://a/t.tar", 1, "y")]
    assert len({file.digest for file in files}) == 4


def test_the_server_of_the_tests_is_asked_once_for_each_size(server: Files, tmp_path):
    """Ranges are asked for without another question for the size."""
    file = describe(f"{server.url}/t-0.tar")
    assert file.read(512, 600) == server.files["t-0.tar"][512:600]
    assert server.starts["t-0.tar"] == [512]
