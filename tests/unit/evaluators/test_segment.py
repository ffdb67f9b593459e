"""The segmentation probe: its measure against loops, its heads one by one, and whole probes."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch.nn import functional as F

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError
from ssl_vit.data.pairs import open_pairs
from ssl_vit.data.view import View
from ssl_vit.evaluators import segment as probe
from ssl_vit.evaluators import segment_scores
from ssl_vit.evaluators.backbone import Backbone, open_backbone
from ssl_vit.evaluators.features import Machine
from ssl_vit.evaluators.maps import maps_of
from ssl_vit.evaluators.options import SegmentOptions
from ssl_vit.evaluators.overlap import Overlap, confusion_matrix, counts, iou
from ssl_vit.evaluators.patch_heads import PatchHeads, fit_patch_heads, patch_heads_loss, upsampled
from ssl_vit.evaluators.segment import segment_probe
from ssl_vit.evaluators.segment_scores import classify
from ssl_vit.evaluators.tokens import Material, gather_tokens, token_extractor
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import EncoderInfo

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def backbone(
    folder: Path, channels: int = 3, size=(16, 24), module: bool = True, **changes
) -> Backbone:
    """A small random ViT, which sees colours and textures well enough; or pixels."""
    options = {"arch": "vit_tiny_patch16_224", "width": 32, "depth": 2, "heads": 2, "patch_size": 4}
    config = EncoderConfig(**{**options, "image_size": size, **changes})
    torch.manual_seed(0)
    encoder = Encoder(config, channels).eval() if module else None
    info = EncoderInfo(config, channels, (0.5,) * channels, (0.25,) * channels)
    view = View(size, channels, info.mean, info.std)
    return Backbone("some", encoder, view, ("cls",), {}, folder, info)


def textures(root: Path, n: int, seed: int, channels: int = 3, sizes=((32, 48), (21, 30))) -> str:
    """Noise of another colour in the three parts of each image, cut at random: three classes."""
    random = np.random.RandomState(seed)
    colours = np.random.RandomState(99).randint(40, 216, (3, channels))
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        height, width = sizes[i % len(sizes)]
        mask = np.zeros((height, width), np.uint8)
        row, column = random.randint(height // 4, height // 2), random.randint(width // 4, width)
        mask[row:], mask[row:, column:] = 1, 2
        image = colours[mask] + random.randn(height, width, channels) * 10
        image = np.clip(image, 0, 255).astype(np.uint8)
        planar = "contig" if channels > 1 else None  # else each row would be a page of the file
        path = root / f"images/{i}.tif"
        tifffile.imwrite(path, image, photometric="minisblack", planarconfig=planar)
        Image.fromarray(mask).save(root / f"masks/{i}.png")
    return f"pairs:{root}"


def change_masks(root: Path, change) -> None:
    for file in sorted((root / "masks").iterdir()):
        Image.fromarray(change(np.array(Image.open(file)))).save(file)


def run(encoder: Backbone, train: str, val: str, seed: int = 0, **options):
    config = SegmentOptions(**{"epochs": 6, **options})
    pairs = open_pairs(train), open_pairs(val)
    machine = Machine(CPU, torch.float32, 0, 16)
    scores, card, _ = segment_probe(config, encoder, *pairs, machine, seed)
    return scores[0], card


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("textures")
    return textures(root / "train", 24, 0), textures(root / "val", 6, 1)


def test_a_rate_is_chosen_by_masks_that_have_a_class(data, tmp_path):
    """A held-out mask without one would leave nothing to choose by."""
    train = textures(tmp_path / "train", 12, 0)
    for i in range(0, 12, 2):
        file = tmp_path / f"train/masks/{i}.png"
        Image.fromarray(np.full_like(np.array(Image.open(file)), 255)).save(file)
    for seed in range(4):
        score, _ = run(backbone(tmp_path, module=False), train, data[1], seed=seed, epochs=1)
        found = score.details["held_out_miou_by_lr"].values()
        assert all(0 < value <= 100 for value in found)


def test_masks_that_may_be_misread_are_told(data, tmp_path, caplog):
    """Foreground stored as the number of no class; and images in the place of masks."""
    val = textures(tmp_path / "val", 6, 1)
    change_masks(tmp_path / "val", lambda mask: np.where(mask == 2, 255, mask).astype(np.uint8))
    run(backbone(tmp_path, module=False), data[0], val, epochs=1)
    assert "are 255 and not judged (training: 0.0 %); if 255 is a class there" in caplog.text
    both = textures(tmp_path / "both", 12, 2)
    change_masks(tmp_path / "both", lambda mask: np.where(mask > 0, 255, 0).astype(np.uint8))
    with pytest.raises(UserError, match="if 255 is a class, write it as another number"):
        run(backbone(tmp_path, module=False), both, both, epochs=1)
    noise = np.random.RandomState(0)
    change_masks(tmp_path / "both", lambda mask: noise.randint(0, 255, mask.shape).astype(np.uint8))
    run(backbone(tmp_path, module=False), both, both, epochs=1)
    assert "different values and no classes.txt: if they are images, the folders" in caplog.text


# --- the measure --------------------------------------------------------------------------------


def by_loop(truth: list[int], guess: list[int], classes: int) -> list[float]:
    """Intersection over union of each class, by the definition."""
    found = []
    for c in range(classes):
        judged = [(t, g) for t, g in zip(truth, guess, strict=True) if t >= 0]
        both = sum(t == c and g == c for t, g in judged)
        either = sum(t == c or g == c for t, g in judged)
        found.append(both / either if either else math.nan)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_measure_is_the_loop_of_its_definition(seed):
    """Pixels without a class do not count; class 4 is nowhere, class 3 is guessed only."""
    truth = torch.randint(-1, 3, (300,), generator=seeded(seed))
    guess = torch.randint(0, 4, (300,), generator=seeded(seed + 10))
    table = confusion_matrix(truth, guess, 5)
    expected = by_loop(truth.tolist(), guess.tolist(), 5)
    found = iou(counts(table).double()).tolist()
    assert found == pytest.approx(expected, nan_ok=True)
    assert math.isnan(found[4])
    assert found[3] == 0
    overlap = Overlap(table, counts(table)[None])
    metrics = overlap.metrics()
    assert metrics["miou"] == pytest.approx(100 * sum(expected[:4]) / 4)
    known = truth >= 0
    right = (truth == guess)[known].double()
    assert metrics["pixel_accuracy"] == pytest.approx(100 * float(right.mean()))
    shares = [float((guess == c)[truth == c].double().mean()) for c in range(3)]
    assert metrics["class_accuracy"] == pytest.approx(100 * sum(shares) / 3)


def dice_by_loop(truth: list[int], guess: list[int], classes: int) -> list[float]:
    found = []
    for c in range(classes):
        judged = [(t, g) for t, g in zip(truth, guess, strict=True) if t >= 0]
        both = sum(t == c and g == c for t, g in judged)
        sizes = sum(t == c for t, _ in judged) + sum(g == c for _, g in judged)
        found.append(2 * both / sizes if sizes else math.nan)
    return found


@pytest.mark.parametrize("groups", [None, (7, 3, 7)])
def test_dice_is_the_loop_of_its_definition(groups):
    """Over all pixels; and the mean over images, or groups, that have the class."""
    truth = [torch.randint(-1, 3, (40,), generator=seeded(i)) for i in range(3)]
    guess = [torch.randint(0, 4, (40,), generator=seeded(i + 10)) for i in range(3)]
    truth[1][truth[1] == 2], guess[1][guess[1] >= 2] = 0, 1  # the second image has no class 2
    tables = [confusion_matrix(t, g, 5) for t, g in zip(truth, guess, strict=True)]
    overlap = Overlap(
        sum(tables),
        torch.stack([counts(table) for table in tables]),
        None if groups is None else torch.tensor(groups),
    )
    pooled = dice_by_loop(torch.cat(truth).tolist(), torch.cat(guess).tolist(), 5)
    assert overlap.dice_by_class.tolist() == pytest.approx(pooled, nan_ok=True)
    assert overlap.metrics()["dice"] == pytest.approx(100 * sum(pooled[:4]) / 4)
    units = [[0], [1], [2]] if groups is None else [[1], [0, 2]]
    each = [
        dice_by_loop(
            torch.cat([truth[i] for i in unit]).tolist(),
            torch.cat([guess[i] for i in unit]).tolist(),
            5,
        )
        for unit in units
    ]
    for c, found in enumerate(overlap.dice_by_image.tolist()):
        known = [own[c] for own in each if not math.isnan(own[c])]
        expected = sum(known) / len(known) if known else math.nan
        assert found == pytest.approx(expected, nan_ok=True)


def test_the_interval_is_over_images():
    """None for images alike; else around the score, narrower with more images, by the seed."""
    table = confusion_matrix(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), 2)
    alike = Overlap(5 * table, counts(table).expand(5, -1, -1))
    assert alike.interval(0) == pytest.approx((alike.metrics()["miou"],) * 2)

    def widths(n: int) -> Overlap:
        drawn = torch.randint(0, 2, (n, 2, 50), generator=seeded())
        tables = [
            confusion_matrix(t, torch.where(t.cumsum(0) > 12 + i % 9, t, 0), 2)
            for i, (t, _) in enumerate(drawn)
        ]
        return Overlap(sum(tables), torch.stack([counts(t) for t in tables]))

    few, many = widths(10), widths(160)
    low, high = few.interval(0)
    assert low < few.metrics()["miou"] < high
    assert many.interval(0)[1] - many.interval(0)[0] < 0.5 * (high - low)
    assert few.interval(0) == few.interval(0)
    assert few.interval(0) != few.interval(1)


# --- the heads ----------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path) -> Material:
    """Made-up tokens of which the first number says the class, with noise and ignored pixels."""
    extractor = token_extractor(backbone(tmp_path), 1, Machine(CPU, torch.float32, 0, 64))
    found = gather_tokens(extractor, open_pairs(textures(tmp_path, 1, 0)), 1.0)
    masks = torch.randint(0, 3, (20, 2, 3), generator=seeded()).to(torch.uint8)
    tokens = torch.randn(20, 5, 2, 3, generator=seeded(1))
    tokens[:, 0] += masks
    fine = masks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    fine[:, :, 0] = 255
    mean, std = tokens.mean((0, 2, 3)), tokens.std((0, 2, 3))
    return dataclasses.replace(found, masks=fine, tokens=tokens.half(), mean=mean, std=std)


def test_heads_side_by_side_are_heads_one_by_one(made):
    rates = (0.001, 0.01, 0.1)
    rows = torch.arange(20)
    together = fit_patch_heads(made, rows, 3, rates, 3, 255, 0)
    for i, rate in enumerate(rates):
        alone = fit_patch_heads(made, rows, 3, (rate,), 3, 255, 0)
        torch.testing.assert_close(together.weight[i], alone.weight[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.bias[i], alone.bias[0], atol=1e-5, rtol=1e-4)
    assert (together.weight[2] - together.weight[1]).abs().max() > 0.05


def test_the_loss_is_the_mean_over_pixels_with_a_class():
    """Of each head alone, at the masks' resolution; 0 where no pixel has a class."""
    logits = torch.randn(2, 3, 4, 2, 2, generator=seeded(), dtype=torch.double).float()
    masks = torch.randint(0, 4, (2, 8, 8), generator=seeded(1))
    masks[0, :5] = 255
    found = patch_heads_loss(logits, masks, 255)
    for head in range(3):
        fine = upsampled(logits[:, head], (8, 8)).log_softmax(1)
        kept = [
            -fine[b, masks[b, i, j], i, j]
            for b in range(2)
            for i in range(8)
            for j in range(8)
            if masks[b, i, j] != 255
        ]
        assert float(found[head]) == pytest.approx(float(sum(kept) / len(kept)), rel=1e-5)
    assert patch_heads_loss(logits, torch.full((2, 8, 8), 255), 255).tolist() == [0, 0, 0]


def test_heads_standardise_tokens_by_what_they_were_given():
    heads = PatchHeads(
        torch.tensor([1.0, 2.0]),
        torch.tensor([2.0, 4.0]),
        torch.eye(2)[None],
        torch.tensor([[0.0, 10.0]]),
    )
    tokens = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 2, 3)
    assert heads(tokens)[0, 0, :, 1, 2].tolist() == [1.0, 9.0]
    assert heads(tokens).shape == (1, 1, 2, 2, 3)


def test_logits_are_interpolated_between_centres_of_patches():
    """Against a loop; beyond the outer centres they stay as they are."""
    logits = torch.randn(1, 2, 2, 3, generator=seeded())
    found = upsampled(logits, (8, 6))

    def place(i: int, new: int, old: int) -> tuple[int, int, float]:
        at = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        return int(at), min(int(at) + 1, old - 1), at - int(at)

    for i in range(8):
        for j in range(6):
            top, bottom, down = place(i, 8, 2)
            left, right, along = place(j, 6, 3)
            upper = logits[0, :, top, left] * (1 - along) + logits[0, :, top, right] * along
            lower = logits[0, :, bottom, left] * (1 - along) + logits[0, :, bottom, right] * along
            torch.testing.assert_close(found[0, :, i, j], upper * (1 - down) + lower * down)


@pytest.mark.parametrize("values", [1, 150, 700, 1 << 26])
def test_a_mask_is_the_same_by_some_classes_at_a_time(monkeypatch, values):
    logits = torch.randn(7, 3, 2, generator=seeded())
    logits[4] = logits[1]  # of equal ones the first
    expected = F.interpolate(logits[None], (9, 11), mode="bilinear")[0].argmax(0)
    monkeypatch.setattr(segment_scores, "_VALUES", values)
    assert torch.equal(classify([logits], (9, 11)), expected)


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
def test_tokens_are_the_encoders_at_their_places(tmp_path, data, blocks):
    """Those of each block after the other; statistics are over all of them."""
    encoder = backbone(tmp_path)
    extractor = token_extractor(encoder, blocks, Machine(CPU, torch.float32, 0, 5))
    found = gather_tokens(extractor, open_pairs(data[0]), 1.0)
    assert found.tokens.shape == (24, 32 * blocks, 4, 6)
    assert found.masks.shape == (24, 16, 24)
    assert found.values == (0, 1, 2)
    seen = next(extractor.batches(open_pairs(data[0])))
    x = torch.rand(2, 3, 16, 24, generator=seeded())
    with torch.no_grad():
        whole, own = encoder.module.intermediate(x, last=blocks), extractor.tokens(x)
    for i, block in enumerate(whole):
        assert torch.equal(own[:, 32 * i : 32 * i + 32, 1, 4], block.patches[:, 10])
    torch.testing.assert_close(found.tokens[:5], seen.tokens)
    flat = found.tokens.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.mean.double(), flat.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.std.double(), flat.std(1, correction=0), atol=1e-4, rtol=1e-4)


def test_pixels_are_averaged_over_each_patch(tmp_path):
    extractor = token_extractor(
        backbone(tmp_path, module=False), 1, Machine(CPU, torch.float32, 0, 64)
    )
    x = torch.rand(2, 3, 16, 24, generator=seeded())
    found = extractor.tokens(x)
    assert extractor.name == "pixels"
    assert found.shape == (2, 3, 4, 6)
    torch.testing.assert_close(found[:, :, 2, 5], x[:, :, 8:12, 20:24].mean((2, 3)))


def test_tokens_that_are_too_many_are_made_anew(tmp_path, data, caplog):
    """The same images in the same order, with an unreadable one among them."""
    root = tmp_path / "train"
    textures(root, 24, 0)
    (root / "images/3.tif").write_bytes(b"no image")
    extractor = token_extractor(backbone(tmp_path), 1, Machine(CPU, torch.float32, 0, 16))
    caplog.set_level("INFO", "ssl_vit")
    kept, anew = (gather_tokens(extractor, open_pairs(f"pairs:{root}"), gb) for gb in (1.0, 0.0))
    assert "tokens need 0.0 GB, above --cache-gb 0" in caplog.text
    assert anew.tokens is None
    assert kept.unreadable == anew.unreadable == 1
    rows = torch.tensor([22, 3, 2, 7, 0])
    for (a, b), (c, d) in zip(kept.batches(rows, 2), anew.batches(rows, 2), strict=True):
        torch.testing.assert_close(a, c, atol=2e-3, rtol=2e-3)
        assert torch.equal(b, d)
    scores = [
        run(backbone(tmp_path), f"pairs:{root}", data[1], epochs=2, cache_gb=gb)[0]
        for gb in (1.0, 0.0)
    ]
    assert scores[0].metrics["miou"] == pytest.approx(scores[1].metrics["miou"], abs=0.5)


# --- whole probes -------------------------------------------------------------------------------


def test_textures_are_learned_and_random_labels_are_not(tmp_path, data):
    """The score is that of the confusion matrix, whose pixels are those of the masks' own size."""
    score, card = run(backbone(tmp_path), *data)
    assert score.metrics["miou"] > 75
    assert score.interval[0] <= score.metrics["miou"] <= score.interval[1]
    table = torch.tensor(score.confusion)
    assert int(table.sum()) == 3 * (32 * 48 + 21 * 30) == card["pairs"]["val_pixels"]
    assert list(score.per_class.values()) == pytest.approx(
        (100 * iou(counts(table).double())).tolist()
    )
    assert card["pairs"] | {"train": 24, "val": 6} == card["pairs"]
    for kind in ("dice_by_class", "dice_by_class_mean_over_images"):
        assert list(score.details[kind]) == ["0", "1", "2"]
        assert min(score.details[kind].values()) > 50
    textures(tmp_path / "wrong", 24, 0)
    random = np.random.RandomState(0)
    change_masks(tmp_path / "wrong", lambda m: random.permutation(3).astype(np.uint8)[m])
    wrong, _ = run(backbone(tmp_path), f"pairs:{tmp_path / 'wrong'}", data[1])
    assert wrong.metrics["miou"] < 50


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(tmp_path, channels):
    train, val = (textures(tmp_path / str(s), 16, s, channels) for s in (0, 1))
    score, _ = run(backbone(tmp_path, channels), train, val)
    assert score.metrics["miou"] > 60


def test_pixels_without_a_class_have_no_part(tmp_path):
    """In training nor in judging: wrong numbers under them change nothing but their count."""
    train, val = (textures(tmp_path / str(s), 16, s) for s in (0, 1))

    def hide(mask: np.ndarray) -> np.ndarray:
        mask[:, ::2] = 7
        return mask

    full, _ = run(backbone(tmp_path), train, val)
    for s in (0, 1):
        change_masks(tmp_path / str(s), hide)
    score, card = run(backbone(tmp_path), train, val, ignore=7)
    assert card["pairs"]["val_pixels"] == 8 * (32 * 24 + 21 * 15)
    assert len(score.confusion) == 3
    assert score.metrics["miou"] > full.metrics["miou"] - 8
    seen, _ = run(backbone(tmp_path), train, val, ignore=255)
    assert len(seen.confusion) == 8
    assert "5" not in seen.per_class


def test_a_probe_is_a_function_of_its_seed(tmp_path, data):
    """And of no global random numbers."""
    encoder = backbone(tmp_path)
    torch.manual_seed(5)
    a, _ = run(encoder, *data, seed=3)
    torch.manual_seed(6)
    b, _ = run(encoder, *data, seed=3)
    assert a == b
    assert run(encoder, *data, seed=4)[0].details != a.details


def test_nothing_is_chosen_by_the_validation_masks(tmp_path, data):
    textures(tmp_path / "val", 6, 1)
    change_masks(tmp_path / "val", lambda m: (2 - m).astype(np.uint8))
    encoder = backbone(tmp_path)
    true, false = run(encoder, *data)[0], run(encoder, data[0], f"pairs:{tmp_path / 'val'}")[0]
    for chosen in ("chosen_lr", "held_out_miou_by_lr"):
        assert false.details[chosen] == true.details[chosen]
    assert false.metrics["miou"] < 40 < true.metrics["miou"]


def test_names_of_classes_are_used(tmp_path):
    """Those without a pixel in the truth or the guesses are left out."""
    train, val = (textures(tmp_path / str(s), 16, s) for s in (0, 1))
    for s in (0, 1):
        (tmp_path / f"{s}/classes.txt").write_text("sky\nland\nsea\nnowhere\n")
    score, _ = run(backbone(tmp_path), train, val, epochs=20)
    assert list(score.per_class) == ["sky", "land", "sea"]
    assert len(score.confusion) == 4
    (tmp_path / "1/classes.txt").write_text("sky\nsea\nland\nnowhere\n")
    with pytest.raises(UserError, match=r"class 1 is 'land' in .* and 'sea' in"):
        run(backbone(tmp_path), train, val)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "change", "names", "message"),
    [
        (0, lambda m: m * 0, "", r"have only \[0\] beside --ignore 255; at least two"),
        (0, lambda m: np.where(m > 0, 255, 0), "", r"have only \[0\] beside --ignore 255"),
        (0, lambda m: m.astype(int) * 3000, "", r"go up to 6000 .*at most 4096 classes"),
        (0, lambda m: m, "a\nb\n", r"have class 2, classes.txt names 0 to 1"),
        (1, lambda m: m * 2, "", r"mask of .*images/0.tif has class 4, those of training .* 2"),
        (1, lambda m: m * 0 + 255, "", "no pixel of its masks has a class"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path, part, change, names, message):
    specs = [textures(tmp_path / str(s), 12, s) for s in (0, 1)]
    change_masks(tmp_path / str(part), lambda m: change(m).astype(np.uint16))
    if names:
        (tmp_path / "0/classes.txt").write_text(names)
    with pytest.raises(UserError, match=message) as error:
        run(backbone(tmp_path), *specs, epochs=1)
    assert "\n" not in str(error.value)


def test_too_few_pairs_are_refused(tmp_path, data):
    few = textures(tmp_path / "few", 9, 0)
    with pytest.raises(UserError, match="has 9 readable pairs; a probe needs 10"):
        run(backbone(tmp_path), few, data[1])
    for file in (tmp_path / "few/masks").iterdir():
        file.write_bytes(b"no mask")
    with pytest.raises(UserError, match=r"no pair of .* can be read: .*0\.tif: mask .*0\.png"):
        run(backbone(tmp_path), few, data[1])


def test_a_rate_is_chosen_on_groups_that_were_not_trained_on(tmp_path, made, monkeypatch):
    root = textures(tmp_path / "grouped", 20, 0).removeprefix("pairs:")
    pairs = open_pairs(f"pairs:{root}")
    pairs.groups = np.arange(20) // 2
    judged, trained = [], []
    real_score, real_fit = probe.held_out_miou, probe.fit_patch_heads

    def score(heads, material, rows, ignore):
        judged.append(rows)
        return real_score(heads, material, rows, ignore)

    def fit(material, rows, *rest):
        trained.append(rows)
        return real_fit(material, rows, *rest)

    monkeypatch.setattr(probe, "held_out_miou", score)
    monkeypatch.setattr(probe, "fit_patch_heads", fit)
    for seed in range(3):
        options = SegmentOptions(epochs=1)
        probe.choose_head(dataclasses.replace(made, pairs=pairs), 3, options, seed)
        held, kept = judged[-1].tolist(), trained[-2].tolist()
        assert sorted(held + kept) == list(range(20))
        assert len(held) == 2
        assert not set(pairs.groups[held]) & set(pairs.groups[kept])


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("resnet10t", (64, 128, 256, 512)),
        ("convnext_atto", (40, 80, 160, 320)),
        ("swin_tiny_patch4_window7_224", (96, 192, 384, 768)),
    ],
)
def test_stages_are_joined_at_the_finest(name, widths):
    """Of networks with stages: the last one alone, or all four, interpolated between centres."""
    other = open_backbone(f"random:timm:{name}", 0, (64, 96))
    machine = Machine(CPU, torch.float32, 0, 16)
    one, four = (token_extractor(other, n, machine) for n in (1, 4))
    assert (one.name, one.grid, four.name, four.grid) == ("maps", (2, 3), "maps4", (16, 24))
    images = torch.randn(2, 3, 64, 96, generator=seeded())
    with torch.no_grad():
        last, every = one.tokens(images), four.tokens(images)
        stages = maps_of(other, 4)(images)
    assert every.shape == (2, sum(widths), 16, 24)
    assert torch.equal(last, stages[-1])
    for stage, own in zip(stages, every.split(widths, 1), strict=True):
        torch.testing.assert_close(own, upsampled(stage, (16, 24)), atol=1e-5, rtol=1e-4)


def test_a_network_with_stages_is_probed(data):
    other = open_backbone("random:timm:resnet10t", 0, (32, 48))
    score, card = run(other, *data, blocks=4, epochs=3)
    assert score.features == "maps4"
    assert card["probe"]["token_grid"] == (8, 12)
    assert score.metrics["miou"] > 60


def test_networks_without_maps_are_refused(tmp_path, data):
    other = dataclasses.replace(backbone(tmp_path), module=torch.nn.Flatten(), info=None)
    with pytest.raises(UserError, match=r"--encoder is 'some': Flatten has no feature maps"):
        run(other, *data)
    with pytest.raises(UserError, match=r"--blocks is 4; some has 2"):
        run(backbone(tmp_path), *data, blocks=4)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("epochs", 0, "is 0"),
        ("ignore", -2, "is -2"),
        ("cache_gb", -0.5, "is -0.5"),
        ("scales", (), "is empty"),
        ("scales", (1.0, 0.0), "is 1 0; it must be above 0"),
        ("overlap", 1.0, "is 1"),
    ],
)
def test_options_are_checked(option, value, message):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} {message}"):
        SegmentOptions(**{option: value})


def test_tokens_that_are_not_finite_are_refused(tmp_path, data):
    broken = backbone(tmp_path)
    torch.nn.init.constant_(broken.module.vit.norm.weight, math.inf)
    with pytest.raises(UserError, match=r"tokens of pairs:.* are not finite"):
        run(broken, *data)
