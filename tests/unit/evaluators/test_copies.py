"""Copies: orientations, correlation of small pictures, and what planted copies are found."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.sources import open_source
from ssl_vit.data.view import View
from ssl_vit.evaluators.copies import (
    SMALL,
    TURNS,
    Pair,
    copied,
    correlations,
    edges,
    find_copies,
    first_places,
    in_all_turns,
    nearest_pairs,
    small,
    small_size,
    turned,
    turns_of,
    with_small,
    within,
)
from ssl_vit.evaluators.features import FeatureSet, Machine, extract, pixels
from tests.unit.feature_sets import feature_set, normal

CPU = torch.device("cpu")
SIZE = (32, 32)


def scene(seed: int) -> Image.Image:
    """A picture of a few soft shapes: as photographs, with most of their power in low waves."""
    random = np.random.RandomState(seed)
    rows, columns = np.mgrid[0:48, 0:48] / 48
    picture = np.zeros((48, 48, 3))
    for _ in range(8):
        r, c, s = random.rand(3)
        blob = np.exp(-((rows - r) ** 2 + (columns - c) ** 2) / (0.01 + 0.05 * s))
        picture += blob[..., None] * random.randn(3)
    return Image.fromarray(np.uint8(255 / (1 + np.exp(-picture))))


def recompressed(image: Image.Image) -> Image.Image:
    held = io.BytesIO()
    image.save(held, "JPEG", quality=40)
    return Image.open(io.BytesIO(held.getvalue()))


PLANTED = {
    "recompressed": recompressed,
    "smaller": lambda image: image.resize((24, 24), Image.Resampling.BILINEAR),
    "larger": lambda image: image.resize((96, 96), Image.Resampling.BICUBIC),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.6),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned 90": lambda image: image.transpose(Image.Transpose.ROTATE_270),
    "gray": lambda image: image.convert("L"),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple, tuple]:
    """Sources and features of 40 training pictures, and of 20 others and planted copies."""
    root = tmp_path_factory.mktemp("planted")
    train, val = root / "train", root / "val"
    train.mkdir()
    val.mkdir()
    for i in range(40):
        scene(i).save(train / f"{i:02d}.png")
    for i in range(20):
        scene(100 + i).save(val / f"other{i:02d}.png")
    for i, (name, change) in enumerate(PLANTED.items()):
        change(scene(i)).save(val / f"{name}.png")
    (val / "same.png").write_bytes((train / "30.png").read_bytes())
    (val / "broken.png").write_bytes(b"no image")
    sources = tuple(open_source(f"flat:{p}", ReadConfig(), 3) for p in (train, val))
    view, machine = View(SIZE, 3, (0.5,) * 3, (0.25,) * 3), Machine(CPU, torch.float32, 0)
    made = (
        extract(with_small(pixels), sources[0], view, machine),
        extract(in_all_turns(pixels, turns_of(SIZE)), sources[1], view, machine),
    )
    return sources, made


def found_in(sets, least: float = 0.8) -> dict[str, Pair]:
    sources, made = sets
    pairs = find_copies(sources, made, ("pixels",), SIZE, least, 15, CPU)
    return {Path(sources[1].name(pair.val)).stem: pair for pair in pairs}


def test_planted_copies_are_found_and_no_other_picture(sets):
    found = found_in(sets)
    assert found.keys() == {*PLANTED, "same"}
    for i, name in enumerate(PLANTED):
        assert Path(sets[0][0].name(found[name].train)).stem == f"{i:02d}"
        assert found[name].turn == (name if name in TURNS else "")
        assert not found[name].identical
    assert found["same"].identical
    copies, same = copied(list(found.values()), sets[1][1])
    assert (int(copies.sum()), int(same.sum()), len(copies)) == (8, 1, 28)


def test_the_threshold_decides(sets):
    assert len(found_in(sets, 0.2)) > 8
    assert found_in(sets, 0.9999).keys() < {*PLANTED, "same"}


def test_identical_files_are_found_without_features(sets):
    """Of a plain picture, which correlates with nothing."""
    sources, (train, val) = sets
    blank = {name: torch.zeros_like(part) for name, part in val.parts.items()}
    lost = FeatureSet(blank, val.labels, val.unreadable, val.index)
    pairs = find_copies(sources, (train, lost), ("pixels",), SIZE, 0.8, 5, CPU)
    assert [Path(sources[1].name(pair.val)).stem for pair in pairs] == ["same"]
    assert pairs[0].identical
    assert Path(sources[0].name(pairs[0].train)).stem == "30"
    assert first_places([b"a", b"", b"b", b"a"]) == {b"a": 0, b"b": 2}


def test_copies_within_a_set_are_found_once(sets):
    """Each pair in the order of the images, whichever found the other; none is its own copy."""
    source, made = sets[0][1], sets[1][1]
    root = Path(source.name(0)).parent
    (root / "zagain.png").write_bytes((root / "same.png").read_bytes())
    scene(105).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "a.png")
    source = open_source(f"flat:{root}", ReadConfig(), 3)
    view, machine = View(SIZE, 3, (0.5,) * 3, (0.25,) * 3), Machine(CPU, torch.float32, 0)
    made = extract(in_all_turns(pixels, turns_of(SIZE)), source, view, machine)
    bank = FeatureSet(
        {"pixels": made.parts["pixels@0"], SMALL: made.parts[SMALL]},
        *(made.labels, made.unreadable, made.index),
    )
    for least in (1, 15):
        pairs = find_copies((source, source), (bank, made), ("pixels",), SIZE, 0.8, least, CPU)
        names = [tuple(Path(source.name(i)).stem for i in (p.val, p.train)) for p in pairs]
        assert names == [("same", "zagain"), ("a", "other05")]
        assert (pairs[0].identical, pairs[1].turn) == (True, "mirrored")
    assert [int(each.sum()) for each in copied(pairs, made, one=True)] == [4, 2]
    blank = {name: torch.zeros_like(part) for name, part in made.parts.items()}
    lost = FeatureSet(blank, made.labels, made.unreadable, made.index)
    (only,) = find_copies((source, source), (bank, lost), ("pixels",), SIZE, 0.8, 5, CPU)
    assert (only.val, only.train, only.identical) == (pairs[0].val, pairs[0].train, True)


def test_pairs_within_a_set_are_of_two():
    rows, cosines = torch.tensor([[0, 0], [2, 1], [1, 2], [1, 1]]), torch.tensor([1, 0.3, 0.5, 1])
    pairs, best = within(rows, cosines)
    assert pairs.tolist() == [[1, 2]]
    assert best.tolist() == [0.5]


def test_orientations_are_those_named():
    image = torch.tensor([[1, 2], [3, 4]])
    seen = {TURNS[turn]: turned(image, turn).tolist() for turn in range(8)}
    assert seen[""] == [[1, 2], [3, 4]]
    assert seen["turned 90"] == [[2, 4], [1, 3]]
    assert seen["turned 180"] == [[4, 3], [2, 1]]
    assert seen["mirrored"] == [[2, 1], [4, 3]]
    assert seen["mirrored, turned 180"] == [[3, 4], [1, 2]]
    assert len({str(rows) for rows in seen.values()}) == 8
    assert turns_of((8, 8)) == tuple(range(8))
    wide = torch.arange(6).view(2, 3)
    assert all(turned(wide, turn).shape == (2, 3) for turn in turns_of((2, 3)))


def loop_edges(picture: np.ndarray) -> np.ndarray:
    """Differences of neighbours, one by one, of length 1."""
    rows, columns = picture.shape
    found = [picture[i + 1, j] - picture[i, j] for i in range(rows - 1) for j in range(columns)]
    found += [picture[i, j + 1] - picture[i, j] for i in range(rows) for j in range(columns - 1)]
    return np.array(found) / np.linalg.norm(found)


def test_correlation_is_that_of_the_best_orientation():
    """Against loops, of edges from which their mean is taken."""
    train, val = normal(5, 12), normal(3, 12, seed=1)
    pairs = torch.tensor([[0, 1], [2, 4], [1, 1]])
    turns = (0, 2, 4, 6)
    found, which = correlations(train, val, pairs, (3, 4), turns)
    usual = np.mean([loop_edges(t.view(3, 4).numpy()) for t in train], axis=0)
    for row, (q, t) in enumerate(pairs.tolist()):
        theirs = loop_edges(train[t].view(3, 4).numpy()) - usual
        best = []
        for turn in turns:
            ours = loop_edges(turned(val[q].view(3, 4), turn).numpy()) - usual
            best.append(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs))
        assert float(found[row]) == pytest.approx(max(best), abs=1e-5)
        assert turns[int(np.argmax(best))] == int(which[row])


def test_what_all_pictures_share_makes_no_copies():
    """Pictures of one common shape with noise of their own: alike, and no copies."""
    shape = 3 * normal(64)
    train, val = shape + normal(50, 64, seed=1), shape + normal(50, 64, seed=2)
    pairs = torch.arange(50)[:, None].expand(-1, 2)
    ours, theirs = (edges(pictures.view(50, 8, 8)) for pictures in (val, train))
    assert float((ours * theirs).sum(1).min()) > 0.75
    found, _ = correlations(train, val, pairs, (8, 8), (0,))
    assert float(found.max()) < 0.6


def test_a_smooth_slope_makes_no_copies():
    """Pictures of sky above ground correlate; their edges do not."""
    slope = torch.linspace(-3, 3, 16)[:, None].expand(16, 16)
    train, val = (slope + 0.5 * normal(20, 16, 16, seed=seed) for seed in (1, 2))
    rows = torch.stack([train.flatten(1), val.flatten(1)], dim=1)
    assert float(torch.stack([torch.corrcoef(two)[0, 1] for two in rows]).min()) > 0.85
    pairs = torch.arange(20)[:, None].expand(-1, 2)
    found, _ = correlations(train.flatten(1), val.flatten(1), pairs, (16, 16), (0,))
    assert float(found.max()) < 0.4


def test_plain_pictures_correlate_with_nothing():
    train, val = torch.ones(2, 16), torch.cat([torch.ones(1, 16), normal(1, 16)])
    pairs = torch.tensor([[0, 0], [1, 1]])
    found, _ = correlations(torch.cat([train, normal(2, 16)]), val, pairs, (4, 4), (0,))
    assert found.tolist() == [0, 0]


def test_candidates_are_each_once_with_their_highest_cosine():
    train, val = feature_set(torch.zeros(9), a=normal(9, 4), b=normal(9, 4, seed=1)), normal(3, 4)
    asked = feature_set(
        torch.zeros(3), **{"a@0": val, "a@4": -val, "b@0": val, "b@4": normal(3, 4, seed=5)}
    )
    pairs, cosines = nearest_pairs(train, asked, ("a", "b"), (0, 4), 2, CPU)
    wanted: dict[tuple[int, int], float] = {}
    for name in ("a", "b"):
        for turn in (0, 4):
            ours = asked.parts[f"{name}@{turn}"]
            all_cosines = torch.nn.functional.cosine_similarity(
                ours[:, None], train.parts[name][None], dim=2
            )
            for q in range(3):
                for t in all_cosines[q].argsort(descending=True)[:2].tolist():
                    key, value = (q, t), float(all_cosines[q, t])
                    wanted[key] = max(value, wanted.get(key, -2.0))
    assert [tuple(pair) for pair in pairs.tolist()] == sorted(wanted)
    assert cosines.tolist() == pytest.approx([wanted[key] for key in sorted(wanted)], abs=1e-5)


def test_small_pictures_are_gray_and_half_the_size():
    sizes = [small_size(size) for size in ((224, 224), (32, 32), (64, 48), (8, 8), (12, 4))]
    assert sizes == [(32, 32), (16, 16), (32, 24), (8, 8), (8, 4)]
    images = normal(2, 3, 64, 48)
    made = small(images)
    assert made.shape == (2, 32 * 24)
    first = images[0, :, :2, :2].mean()
    assert float(made[0, 0]) == pytest.approx(float(first), abs=1e-6)
    assert SMALL in with_small(pixels)(images)
