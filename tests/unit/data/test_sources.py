"""Sources of every kind, what they refuse, and that they survive workers."""

import importlib
import io
import os
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data import tar as tar_module
from ssl_vit.data import tar_index
from ssl_vit.data.base import check_classes, describe_labels
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.labels import align_classes
from ssl_vit.data.names import Names
from ssl_vit.data.shard_names import expand
from ssl_vit.data.sources import Source, Subset, open_source, split_holdout
from tests.conftest import SHARED


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 3), value).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value))


def inside(source: Source, root: Path) -> list[str]:
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


def write_tar(path: Path, members: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> None:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def samples(first: int, count: int) -> dict[str, bytes]:
    members = {}
    for i in range(first, first + count):
        members[f"{i:04d}.png"] = png(i)
        members[f"{i:04d}.cls"] = str(i % 3).encode()
    return members


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SSL_VIT_CACHE", str(folder))
    return folder


@pytest.fixture
def cifar() -> str:
    folder = SHARED / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set SSL_VIT_SHARED to the folder that holds data/")
    return f"tar:{folder}/test-000000.tar"


# --- digits, subsets, hold-out -----------------------------------------------------------------


def test_digits_are_split_once_and_by_class():
    everything, train, val = (
        open_source(spec) for spec in ("digits", "digits:train", "digits:val")
    )
    assert (len(everything), len(train) + len(val)) == (1797, 1797)
    names = [{part.name(i) for i in range(len(part))} for part in (everything, train, val)]
    assert names[1] | names[2] == names[0]
    assert not names[1] & names[2]
    shares = np.bincount(val.labels) / np.bincount(everything.labels)
    assert np.abs(shares - 0.2).max() < 0.01
    image, label = everything.read(0)
    assert (image.shape, image.dtype, label) == ((8, 8), np.uint8, 0)
    assert max(everything.read(i)[0].max() for i in range(99)) == 255
    # Fixed for good: other versions must find the same split.
    assert [val.name(i) for i in range(4)] == ["digits[3]", "digits[7]", "digits[13]", "digits[19]"]
    assert val.classes == tuple("0123456789")


def test_subset_and_holdout():
    source = open_source("digits")
    train, held = split_holdout(source, 100, seed=3)
    assert (len(train), len(held)) == (1697, 100)
    assert not set(train.indices) & set(held.indices)
    assert held.name(5) == source.name(int(held.indices[5]))
    assert held.read(5)[1] == held.labels[5] == source.labels[held.indices[5]]
    np.testing.assert_array_equal(split_holdout(source, 100, seed=3)[1].indices, held.indices)
    assert set(split_holdout(source, 100, seed=4)[1].indices) != set(held.indices)
    assert len(split_holdout(source, 10**6, seed=0)[1]) == 179
    assert len(split_holdout(Subset(source, np.arange(5)), 2, seed=0)[1]) == 0
    nested = Subset(held, np.array([7, 1]))
    assert nested.source is source
    assert nested.name(0) == held.name(7)


def test_names_are_kept_as_two_arrays():
    names = Names.joined([Names.of(iter([b"a", b"", b"ccc"])), Names.of([]), Names.of([b"dd"])])
    assert [names[i] for i in range(len(names))] == [b"a", b"", b"ccc", b"dd"]
    assert names[-1] == b"dd"
    with pytest.raises(IndexError):
        names[4]
    assert (names.buffer.dtype, names.ends.dtype) == (np.uint8, np.int64)


# --- folders -----------------------------------------------------------------------------------


def test_top_level_folders_are_classes(tmp_path):
    for name in ("dog/z.PNG", "dog/deep/er/a.png", "cat/b.png", "cat/.hidden.png", "cat/x.txt"):
        put(tmp_path / name)
    put(tmp_path / ".git" / "a.png")
    (tmp_path / "empty").mkdir()
    source = open_source(f"folder:{tmp_path}")
    assert inside(source, tmp_path) == ["cat/b.png", "dog/z.PNG", "dog/deep/er/a.png"]
    assert source.classes == ("cat", "dog", "empty")
    np.testing.assert_array_equal(source.labels, np.array([0, 1, 1]))
    assert source.read(2) == (png(0), 1)
    flat = open_source(f"flat:{tmp_path}")
    assert inside(flat, tmp_path) == inside(source, tmp_path)
    assert (flat.labels, flat.classes, flat.read(0)[1]) == (None, None, None)


def test_images_beside_folders_mean_no_classes(tmp_path):
    put(tmp_path / "b.png")
    put(tmp_path / "a.png")
    source = open_source(f"folder:{tmp_path}")
    assert (inside(source, tmp_path), source.labels) == (["a.png", "b.png"], None)
    put(tmp_path / "more" / "c.png")
    source = open_source(f"folder:{tmp_path}")
    assert (inside(source, tmp_path), source.labels) == (["a.png", "b.png", "more/c.png"], None)


def test_links_are_followed_and_loops_end(tmp_path):
    put(tmp_path / "elsewhere" / "a.png", 7)
    put(tmp_path / "data" / "cat" / "b.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere")
    source = open_source(f"folder:{tmp_path / 'data'}")
    assert inside(source, tmp_path / "data") == ["cat/b.png", "dog/a.png"]
    assert source.read(1) == (png(7), 1)


def test_unreadable_files_are_bad_images(tmp_path):
    put(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere")
    source = open_source(f"folder:{tmp_path}")
    assert len(source) == 2
    with pytest.raises(BadImage, match="No such file"):
        source.read(1)


def test_names_need_not_be_text(tmp_path):
    name = b"caf\xe9.png"
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
        file.write(png(5))
    source = open_source(f"flat:{tmp_path}")
    assert source.read(0)[0] == png(5)
    assert os.fsencode(source.name(0)).endswith(name)


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    put(tmp_path / "images" / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("folder:~/images")) == 1


# --- shards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_hold_samples_by_key(tmp_path, kind):
    long = "f" * 90 + "/" + "n" * 60  # beyond the 100 bytes of a plain header
    members = {
        "d.ir/b.x.txt": b"text",
        "d.ir/b.cls": b"4\n",
        "d.ir/b.x.JPG": b"first",
        "d.ir/b.png": b"second",
        f"{long}.png": b"long",
        f"{long}.cls": b"1",
        "._junk.png": b"hidden",
    }
    write_tar(tmp_path / "a.tar", members, kind)
    source = open_source(f"tar:{tmp_path / 'a.tar'}")
    # Of two images of one sample that with the more usual extension, here of the other sample.
    assert [source.read(i) for i in range(len(source))] == [(b"second", 4), (b"long", 1)]
    assert source.name(0) == f"{tmp_path}/a.tar:d.ir/b"
    assert source.name(1).endswith(long)
    assert source.classes == ("0", "1", "2", "3", "4")


def test_patterns_name_shards_in_order(tmp_path):
    for shard in range(8, 12):
        write_tar(tmp_path / f"s-{shard:03d}-{shard % 2}.tar", samples(10 * shard, shard - 6))
    ranged = open_source(f"tar:{tmp_path}/s-{{008..011}}-*.tar")
    np.testing.assert_array_equal(ranged.starts, [0, 2, 5, 9, 14])
    assert [ranged.name(i)[-4:] for i in (0, 2, 13)] == ["0080", "0090", "0114"]
    assert [ranged.read(i)[0] for i in (0, 2, 13)] == [png(80), png(90), png(114)]
    assert len(open_source(f"tar:{tmp_path}/s-*.tar")) == 14
    assert len(open_source(f"tar:{tmp_path}/s*")) == 14  # the indexes beside them are no shards
    both = expand("", "{0..1}/{08..10}")
    assert both == ["0/08", "0/09", "0/10", "1/08", "1/09", "1/10"]
    assert expand("", "{00..04..2,7,a}.tar") == ["00.tar", "02.tar", "04.tar", "7.tar", "a.tar"]
    assert expand("", "x{y}z.tar") == ["x{y}z.tar"]
    for wrong, reason in (("{a..f}", "no range of numbers"), ("{{0..1},2}", "within braces")):
        with pytest.raises(UserError, match=reason):
            expand("", wrong)
    with pytest.raises(UserError, match=r"no .*s-012-0\.tar and 1 more"):
        open_source(f"tar:{tmp_path}/s-{{012..013}}-0.tar")
    with pytest.raises(UserError, match="empty"):
        open_source(f"tar:{tmp_path}/s-{{9..8}}.tar")


def test_samples_without_label_are_said_and_the_others_keep_theirs(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", samples(0, 3) | {"last.png": png(0)})
    write_tar(tmp_path / "b.tar", {"0.png": png(0)})
    source = open_source(f"tar:{tmp_path}/*.tar")
    assert source.labels.tolist() == [0, 1, 2, -1, -1]
    assert [source.read(i)[1] for i in (2, 3)] == [2, None]
    assert (
        "2 of 5 samples have no label in .cls of the shards, of 1 of 2 shards none" in caplog.text
    )
    assert describe_labels(source).endswith("; unknown for 2 of 5 images")


def test_index_is_kept_checked_and_rebuilt(tmp_path, monkeypatch):
    shard, spec = tmp_path / "a.tar", f"tar:{tmp_path / 'a.tar'}"
    scans = []
    scan = tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda *a: scans.append(1) or scan(*a))
    write_tar(shard, samples(0, 3))
    first = open_source(spec)
    index = tmp_path / "a.tar.ssl_vit.npz"
    assert index.is_file()
    again = open_source(spec)
    assert len(scans) == 1
    assert [again.read(i) for i in range(3)] == [first.read(i) for i in range(3)]
    assert again.name(2) == first.name(2)

    write_tar(shard, samples(50, 3))  # same size
    os.utime(shard, ns=(0, 12345))
    assert open_source(spec).read(0)[0] == png(50)
    assert len(scans) == 2
    write_tar(shard, samples(0, 30))
    os.utime(shard, ns=(0, 12345))  # same time
    assert len(open_source(spec)) == 30
    assert len(scans) == 3
    for damage in (b"", b"junk", index.read_bytes()[:-40]):
        index.write_bytes(damage)
        assert len(open_source(spec)) == 30
    assert len(scans) == 6
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_index_loads_no_pickle(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    write_tar(tmp_path / "a.tar", samples(0, 2))
    np.savez(tmp_path / "a.tar.ssl_vit.npz", stamp=np.array([Payload()], dtype=object))
    assert len(open_source(f"tar:{tmp_path / 'a.tar'}")) == 2
    assert not (tmp_path / "executed").exists()


def test_index_of_a_read_only_folder_goes_to_the_cache(tmp_path, cache):
    folder = tmp_path / "read-only"
    folder.mkdir()
    write_tar(folder / "a.tar", samples(0, 2))
    folder.chmod(0o555)
    try:
        for _ in range(2):
            assert len(open_source(f"tar:{folder}/a.tar")) == 2
        assert [path.name for path in folder.iterdir()] == ["a.tar"]
    finally:
        folder.chmod(0o755)
    assert len(list(cache.glob("a.tar-*.ssl_vit.npz"))) == 1


def test_damaged_shards_are_named(tmp_path):
    write_tar(tmp_path / "whole.tar", samples(0, 4))
    whole = (tmp_path / "whole.tar").read_bytes()
    shard = tmp_path / "cut.tar"
    # within a header, within data, between two members, and with a header overwritten
    for data in (whole[:700], whole[:1100], whole[:2048], whole[:2048] + b"x" * 512 + whole[2560:]):
        shard.write_bytes(data)
        with pytest.raises(UserError, match=r"cut\.tar is truncated or damaged"):
            open_source(f"tar:{shard}")
        assert not (tmp_path / "cut.tar.ssl_vit.npz").exists()
    shard.write_bytes(whole)
    source = open_source(f"tar:{shard}")
    os.truncate(shard, 2000)
    with pytest.raises(BadImage, match=r"cut\.tar ends before it"):
        source.read(3)


def test_what_a_shard_must_not_be(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match="decompress"):
        open_source(f"tar:{tmp_path / 'a.tar.gz'}")
    write_tar(tmp_path / "text.tar", {"a.txt": b"1"})
    with pytest.raises(UserError, match="no image"):
        open_source(f"tar:{tmp_path / 'text.tar'}")
    (tmp_path / "no.tar").write_bytes(b"no tar file" * 99)
    with pytest.raises(UserError, match=r"no\.tar"):
        open_source(f"tar:{tmp_path / 'no.tar'}")


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "_MAX_OPEN", 2)
    for shard in range(5):
        write_tar(tmp_path / f"{shard}.tar", samples(shard, 1))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    source = open_source(f"tar:{tmp_path}/*.tar")
    for i in (0, 1, 2, 3, 4, 0, 4):
        assert source.read(i)[0] == png(i)
    assert len(source._files) == 2
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before + 2


class _Bytes(Dataset):
    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> bytes:
        return self.source.read(i)[0]


def test_shards_are_read_alike_in_workers(tmp_path):
    write_tar(tmp_path / "a.tar", samples(0, 20))
    source = open_source(f"tar:{tmp_path / 'a.tar'}")
    expected = [source.read(i)[0] for i in range(20)]  # opened before the fork
    for start, workers in (("fork", 2), ("spawn", 1)):  # each that is spawned imports torch anew
        loader = DataLoader(
            _Bytes(source), batch_size=None, num_workers=workers, multiprocessing_context=start
        )
        assert list(loader) == expected


def test_real_shards_in_a_read_only_folder(cifar, cache):
    source = open_source(cifar)
    assert len(source) == 10_000
    np.testing.assert_array_equal(np.bincount(source.labels), np.full(10, 1000))
    assert decode(source.read(9_999)[0], 3).shape == (3, 32, 32)
    assert len(list(cache.iterdir())) == 1
    np.testing.assert_array_equal(open_source(cifar).offsets, source.offsets)


# --- other libraries ---------------------------------------------------------------------------


def make_cifar(root: Path) -> None:
    """The pickled files that torchvision reads, with 2 images in each."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for k, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        pixels = np.full((2, 3072), k, np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [k, 9]}))
    names = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))


def test_torchvision_splits(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    make_cifar(tmp_path)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    spec = f"torchvision:CIFAR10:{tmp_path}"
    assert [len(open_source(spec + split)) for split in ("", ":train", ":test", ":val")] == [
        10,
        10,
        2,
        2,
    ]
    source = open_source(spec + ":test")
    image, label = source.read(0)
    assert (image.shape, image.max(), label) == ((32, 32, 3), 5, 5)
    np.testing.assert_array_equal(source.labels, [5, 9])
    assert source.classes[9] == "class 9"
    with pytest.raises(UserError, match="'valid' is none of train, val, test"):
        open_source(spec + ":valid")


def test_torchvision_data_sets_with_other_signatures(tmp_path):
    put(tmp_path / "a" / "x.png", 7)
    put(tmp_path / "b" / "y.png")
    source = open_source(f"torchvision:ImageFolder:{tmp_path}")
    assert (source.classes, source.labels.tolist()) == (("a", "b"), [0, 1])
    assert source.read(0)[0].max() == 7
    assert source.labels.dtype == np.int64
    (tmp_path / "b" / "y.png").write_bytes(b"junk")
    with pytest.raises(BadImage):
        source.read(1)
    with pytest.raises(UserError, match="no splits"):
        open_source(f"torchvision:ImageFolder:{tmp_path}:test")


def test_torchvision_refusals(tmp_path):
    with pytest.raises(UserError, match=r"CIFAR10.*download=True\)"):
        open_source(f"torchvision:CIFAR10:{tmp_path}")
    with pytest.raises(UserError, match=r"SVHN.*split='test', download=True\)"):
        open_source(f"torchvision:SVHN:{tmp_path}:val")
    with pytest.raises(UserError, match="Unknown value"):
        open_source(f"torchvision:SVHN:{tmp_path}:nonsense")
    with pytest.raises(UserError, match="nearest known: CIFAR10"):
        open_source(f"torchvision:cifar10:{tmp_path}")
    with pytest.raises(UserError, match="nearest known"):
        open_source(f"torchvision:CIFAR11:{tmp_path}")
    with pytest.raises(UserError, match="lacks the folder"):
        open_source("torchvision:CIFAR10")


def make_hf(**extra):
    datasets = pytest.importorskip("datasets", reason="the extra ssl_vit[hf] is not installed")
    images = [{"bytes": png(value), "path": None} for value in (1, 2, 3)]
    kinds = {"picture": datasets.Image(), **{name: kind for name, (kind, _) in extra.items()}}
    columns = {"picture": images, **{name: values for name, (_, values) in extra.items()}}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def test_hugging_face_data_saved_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra ssl_vit[hf] is not installed")
    kind = datasets.ClassLabel(names=["cat", "dog"])
    dataset = make_hf(species=(kind, [1, 0, 1]), text=(datasets.Value("string"), ["a", "b", "c"]))
    dataset.save_to_disk(tmp_path / "one")
    source = open_source(f"hf:{tmp_path / 'one'}")
    assert [source.read(i) for i in range(3)] == [(png(1), 1), (png(2), 0), (png(3), 1)]
    assert source.classes == ("cat", "dog")
    assert source.labels.dtype == np.int64
    assert pickle.loads(pickle.dumps(source)).read(2) == (png(3), 1)

    parts = datasets.DatasetDict(train=dataset, test=dataset.select([2]))
    parts.save_to_disk(tmp_path / "parts")
    assert len(open_source(f"hf:{tmp_path / 'parts'}")) == 3
    assert open_source(f"hf:{tmp_path / 'parts'}:test").read(0) == (png(3), 1)
    with pytest.raises(UserError, match=r"no split 'val', only: train, test"):
        open_source(f"hf:{tmp_path / 'parts'}:val")

    missing = make_hf(species=(kind, [1, None, 0]))
    missing.save_to_disk(tmp_path / "missing")
    assert open_source(f"hf:{tmp_path / 'missing'}").labels.tolist() == [1, -1, 0]
    dataset.remove_columns("picture").save_to_disk(tmp_path / "blind")
    with pytest.raises(UserError, match="no image column, only: species, text"):
        open_source(f"hf:{tmp_path / 'blind'}")


def test_hugging_face_is_an_optional_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ssl_vit\[hf\]'"):
        open_source("hf:anything")


# --- what is refused ---------------------------------------------------------------------------


def test_unknown_and_empty_sources(tmp_path):
    put(tmp_path / "full" / "a.png")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    for spec, reason in {
        "floder:/x": "nearest known: folder",
        str(tmp_path / "full"): "did you mean 'folder:",
        "": "names no source",
        "folder:": "lacks what follows",
        "digits:test": "digits:train and digits:val",
        f"folder:{tmp_path / 'empty'}": "holds no image",
        f"flat:{tmp_path / 'empty'}": "holds no image",
        f"folder:{tmp_path / 'missing'}": "does not exist",
        f"folder:{tmp_path / 'full' / 'a.png'}": "is a file",
        f"flat:{tmp_path}/x.tar": "did you mean 'tar:",
        f"tar:{tmp_path / 'missing.tar'}": "there is no",
        f"tar:{tmp_path}/*.tar": "there is no",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            open_source(spec)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["digits", "folder", "flat", "tar"])
def test_sources_can_be_sent_to_another_process(spec, tmp_path):
    put(tmp_path / "a" / "b.png", 3)
    write_tar(tmp_path / "a.tar", samples(3, 1))
    path = {"digits": "", "tar": f":{tmp_path}/a.tar"}.get(spec, f":{tmp_path}")
    source = open_source(spec + path)
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.name(0) == source.name(0)
    np.testing.assert_array_equal(copy.read(0)[0], source.read(0)[0])


def test_every_kind_of_source_has_its_opener():
    from ssl_vit.data import sources

    for module, function in sources._OPENERS.values():
        assert callable(getattr(importlib.import_module(module), function))


def test_equal_names_are_one_class_in_two_sources(tmp_path):
    """A class missing from one of them would shift every label behind it."""
    folders = {
        "train": ("cat", "dog", "owl"),
        "val": ("cat", "owl"),
        "more": ("ape", "dog"),
        "other": ("0", "1"),
    }
    for name in (f"{part}/{label}" for part, labels in folders.items() for label in labels):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    train, val, more, other = (open_source(f"folder:{tmp_path / n}") for n in folders)
    with pytest.raises(UserError, match=r"class 1 is 'dog' in .*train and 'owl' in .*val"):
        check_classes(train, val)
    assert align_classes(train, train) is train
    same = align_classes(train, val)
    assert (same.classes, same.labels.tolist()) == (train.classes, [0, 2])
    assert (same.read(1)[1], same.name(1)) == (2, val.name(1))
    assert same.labels_from == "class folders"
    extra = align_classes(train, more)
    assert (extra.classes, extra.labels.tolist()) == (("cat", "dog", "owl", "ape"), [3, 1])
    with pytest.raises(UserError, match="both must have the same classes"):
        align_classes(train, other)
    flat = open_source(f"flat:{tmp_path / 'val'}")
    assert align_classes(train, flat) is flat


# --- four fifths and the other fifth -------------------------------------------------------------


def test_kept_and_held_are_a_fixed_split_of_any_source():
    whole, kept, held = (open_source(f"{part}digits:train") for part in ("", "kept:", "held:"))
    assert (len(kept), len(held)) == (len(whole) - len(whole) // 5, len(whole) // 5)
    names = [[source.name(i) for i in range(len(source))] for source in (whole, kept, held)]
    assert sorted(names[1] + names[2]) == sorted(names[0])
    assert [source.spec for source in (kept, held)] == ["kept:digits:train", "held:digits:train"]
    assert open_source("held:digits:train").name(0) == names[2][0]
    assert Subset(held, np.arange(3)).spec == "held:digits:train"


def test_planes_of_a_file_are_not_parted(tmp_path):
    for i in range(10):
        frames = [Image.new("L", (4, 3), 20 * i + j) for j in range(3)]
        path = tmp_path / f"{i}.tif"
        frames[0].save(path, save_all=True, append_images=frames[1:])
    reading = ReadConfig(slices="all")
    kept, held = (open_source(f"{part}:flat:{tmp_path}", reading) for part in ("kept", "held"))
    assert (len(kept), len(held)) == (24, 6)
    files = [
        {source.name(i).split(".tif")[0] for i in range(len(source))} for source in (kept, held)
    ]
    assert not files[0] & files[1]


@pytest.mark.parametrize(
    ("spec", "said"), [("held:", "names no source"), ("kept:folder:nowhere", "nowhere")]
)
def test_a_part_of_nothing_is_refused(spec, said):
    with pytest.raises(UserError, match=said):
        open_source(spec)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    values, classes = load_digits(return_X_y=True)
    source = open_source("digits")
    assert source.labels.tolist() == classes.tolist()
    pixels = np.stack([source.read(i)[0] for i in range(0, len(source), 100)])
    expected = values[::100].reshape(-1, 8, 8) * 255 / 16
    assert np.abs(pixels.reshape(expected.shape) - expected).max() <= 1
