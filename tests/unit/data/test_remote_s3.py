"""Shards of S3, by a real client against a server on loopback."""

import logging
import socket

import fsspec
import pytest

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data import remote
from ssl_vit.data.sources import open_source
from tests.unit.data.test_sources import samples, write_tar

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")
KEYS = {"AWS_ACCESS_KEY_ID": "KEY", "AWS_SECRET_ACCESS_KEY": "HIDDEN"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards, and a bucket with them; yields their folder and the address of the server."""
    folder = tmp_path_factory.mktemp("shards")
    for s in range(3):
        write_tar(folder / f"t-{s}.tar", samples(10 * s, 10))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    made.start()
    url = "http://{}:{}".format(*made.get_host_and_port())
    fill(url, folder)
    yield folder, url
    made.stop()


def fill(url, folder) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="KEY",
        aws_secret_access_key="HIDDEN",
    )
    client.create_bucket(Bucket="photos")
    for path in folder.glob("*.tar"):
        public = {"ACL": "public-read"}
        client.upload_file(str(path), "photos", f"a/{path.name}", ExtraArgs=public)
        client.put_object(Bucket="photos", Key=f"a/{path.name}.ssl_vit.npz", Body=b"")


@pytest.fixture(autouse=True)
def environment(shards, tmp_path, monkeypatch):
    """As a user sets it, and nothing of this machine's."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", shards[1])
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES", (0.01,))
    remote._opened.cache_clear()


@pytest.mark.parametrize("pattern", ["s3://photos/a/t-{0..2}.tar", "tar:s3://photos/a/*.tar"])
def test_shards_of_a_bucket_are_those_on_a_disk(shards, pattern):
    source, here = open_source(pattern), open_source(f"tar:{shards[0]}/*.tar")
    assert len(source) == len(here) == 30
    assert all(source.read(i) == here.read(i) for i in range(30))
    assert source.labels.tolist() == here.labels.tolist()
    assert source.name(11) == "s3://photos/a/t-1.tar:0011"


def test_single_images_are_read_by_ranges(shards, tmp_path):
    few = ReadConfig(shard_cache=str(tmp_path), shard_cache_size=31e-6)  # a shard: 30,720 bytes
    source, here = (
        open_source("s3://photos/a/t-{0..2}.tar", few),
        open_source(f"tar:{shards[0]}/*.tar"),
    )
    assert source.apart
    assert all(source.read(i) == here.read(i) for i in (0, 15, 29))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("s3://nothing-there/t.tar", "there is no shard s3://nothing-there/t.tar"),
        ("s3://photos/t.tar", "there is no shard s3://photos/t.tar"),
        ("s3://photos/b/*.tar", r"there is no shard s3://photos/b/\*.tar"),
    ],
)
def test_what_is_not_there(spec, reason):
    with pytest.raises(UserError, match=reason):
        open_source(spec)


def test_missing_credentials_are_told_with_where_they_are_looked_for(monkeypatch):
    for name in KEYS:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=r"without credentials .*AWS_PROFILE, ~/.aws") as caught:
        open_source("s3://photos/a/t-0.tar")
    assert "\n" not in str(caught.value)
    assert "FSSPEC_S3='{\"anon\": true}'" in str(caught.value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})  # as that sets it
    remote._opened.cache_clear()
    assert len(open_source("s3://photos/a/t-0.tar")) == 10


def test_an_address_that_is_none_is_one_line():
    with pytest.raises(UserError, match=r"is refused as an address: .*bucket name") as caught:
        open_source("s3://a!b/t.tar")
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(Exception, match=r"s3://photos/a/t-0.tar cannot be read, .*Endpoint") as e:
        open_source("s3://photos/a/t-0.tar")
    assert type(e.value).__name__ == "RunFailed"
    assert "\n" not in str(e.value)
