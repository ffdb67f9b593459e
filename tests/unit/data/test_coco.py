"""COCO's annotations: what is read, what is refused in one line, what jitter makes of it."""

import copy
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import DataConfig, ReadConfig
from ssl_vit.common.seeds import fold
from ssl_vit.data.coco import coco_of, object_counts
from ssl_vit.data.coco_images import JitteredObjects, WholeImages, mask_boxes, unpacked
from ssl_vit.data.jitter import Jitter, Placement, draw_placement, fitted, place
from ssl_vit.data.loader import Part
from ssl_vit.data.order import Places
from ssl_vit.data.sources import open_source
from tests.unit.coco_files import NAMES, coco_at, content_of, written

JITTER = Jitter((32, 40), (0.3, 2.0), 0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder and annotations of a sound data set."""
    root = tmp_path_factory.mktemp("coco")
    return root, content_of(root)


def opened(made, content=None):
    root, own = made
    return open_source(written(root, content or own))


def test_reads_what_the_file_says(made):
    root, content = made
    source = opened(made)
    assert len(source) == 6
    assert source.classes == NAMES  # in the order of their ids
    assert source.name(2) == str(root / "images/2.png")
    for i in range(6):
        mine = [a for a in content["annotations"] if a["image_id"] == 10 + i]
        found = source.objects(i)
        assert found.numbers.tolist() == [{3: 0, 7: 1}[a["category_id"]] for a in mine]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
        assert found.boxes.tolist() == corners
        masks = source.masks(i, found.rows)
        assert masks.shape == (len(mine), 48, 64)
        assert masks.sum((1, 2)).tolist() == [a["area"] for a in mine]
    assert source.has_masks
    two = open_source(f"coco:{root / 'images'}:{root / 'annotations.json'}")
    assert two.annotations_sha256() == source.annotations_sha256()
    held = open_source(f"held:coco:{root}")
    coco, rows = coco_of(held, "")
    assert coco.name(int(rows[0])) == held.name(0)
    assert object_counts(held).tolist() == [len(coco.objects(int(row)).boxes) for row in rows]


def broken(content, change):
    content = copy.deepcopy(content)
    change(content)
    return content


REFUSED = {
    "category": (
        lambda c: c["annotations"][4].update(category_id=9),
        "annotation 5 is of category 9, which is not among its 2 categories",
    ),
    "image": (
        lambda c: c["annotations"][4].update(image_id=99),
        "annotation 5 is of image 99, which is not among its 6 images",
    ),
    "bbox": (
        lambda c: c["annotations"][4].update(bbox=[1, 2, 3]),
        "annotation 5 has the bbox [1, 2, 3]; it must be left, top, width, height",
    ),
    "not finite": (
        lambda c: c["annotations"][4].update(bbox=[1, 2, 3, float("nan")]),
        "annotation 5 has the bbox [1, 2, 3, nan]",
    ),
    "file": (
        lambda c: c["images"][3].update(file_name="gone.png"),
        "names 1 of 6 images that are not in",
    ),
    "list": (lambda c: c.pop("categories"), "it has no list 'categories'"),
    "polygon": (
        lambda c: c["annotations"][4].update(segmentation=[[1, 2, 3, 4]]),
        "annotation 5 has a segmentation that is no list of polygons",
    ),
    "corner": (
        lambda c: c["annotations"][4].update(segmentation=[[1, 2, 3, 4, "5", 6]]),
        "annotation 5 has a segmentation that is no list of polygons",
    ),
    "runs": (
        lambda c: c["annotations"][4].update(segmentation={"counts": [3], "size": [48, 64]}),
        "annotation 5 has a segmentation that does not fit",
    ),
    "empty": (
        lambda c: [a.update(bbox=[1, 1, 0, 4]) for a in c["annotations"][4:6]],
        "2 of 12 annotations cannot be used; the first: annotation 5, bbox 1 1 0 4, is empty",
    ),
    "outside": (
        lambda c: [a.update(bbox=[70, 1, 5, 5]) for a in c["annotations"][4:6]],
        "annotation 5, bbox 70 1 5 5, lies outside of its image, 64 x 48; --data.max-bad is 0.05",
    ),
    "twice": (lambda c: c["images"].append(c["images"][0]), "two images have the id 10"),
    "size": (lambda c: c["images"][0].pop("height"), "an image needs an id, a file_name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_annotations_are_told_by_their_id(made, name):
    change, said = REFUSED[name]
    with pytest.raises(UserError) as error:
        opened(made, broken(made[1], change))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_names(made, tmp_path):
    root = made[0]
    (tmp_path / "text.json").write_text("{")
    for spec, said in (
        (f"coco:{root}/nowhere", "is no folder"),
        (f"coco:{root}:gone.json", "there is no file gone.json"),
        (f"coco:{root}:{tmp_path / 'text.json'}", "cannot be read as JSON"),
        (f"coco:{root}:a:b", "names no annotated images"),
    ):
        with pytest.raises(UserError, match=said):
            open_source(spec)
    with pytest.raises(UserError, match="tile has no effect on coco"):
        open_source(f"coco:{root}", ReadConfig(tile=(8,)))


def test_few_unusable_boxes_are_left_out_with_a_word(made, caplog):
    """As in COCO itself, of whose 860,001 boxes one or two are empty."""

    def change(content):
        content["annotations"][4]["bbox"] = [1, 1, 0, 4]
        content["annotations"][6]["bbox"] = [-5, 40, 20, 30]

    root, content = made
    path = written(root, broken(content, change))
    with caplog.at_level(logging.WARNING, "ssl_vit"):
        source = open_source(path, DataConfig(max_bad=0.1))
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "1 of 12 annotations cannot be used; the first: annotation 5" in said
    assert "1 of 12 boxes reach over the edge and end there; the first: annotation 7" in said
    assert "x1 y1 x2 y2" not in said
    assert len(source.objects(2).boxes) == 1
    assert [0, 40, 15, 48] in source.objects(3).boxes.tolist()


def test_corners_instead_of_width_and_height_are_asked_about(made, caplog):
    def change(content):
        for one in content["annotations"]:
            x, y, w, h = one["bbox"]
            one["bbox"] = [x, y, x + w, y + h]

    content = broken(made[1], change)
    boxes = (one["bbox"] for one in content["annotations"])
    over = sum(max(x + w - 64, y + h - 48) > 1 for x, y, w, h in boxes)
    with caplog.at_level(logging.WARNING, "ssl_vit"):
        opened(made, content)
    said = caplog.records[-1].getMessage()
    assert f"{over} of 12 boxes reach over the edge" in said
    assert said.endswith("; are they x1 y1 x2 y2? COCO's are x, y, width, height")


def test_crowds_are_not_learned_from(made):
    source = opened(made, broken(made[1], lambda c: c["annotations"][0].update(iscrowd=1)))
    assert len(source.objects(0).boxes) == 1
    assert source.annotations.crowd.sum() == 1
    assert object_counts(source).tolist() == [len(source.objects(i).boxes) for i in range(6)]


def by_loops(values, at: Placement, fill):
    """Each pixel of the frame, from the pixel of the image under its centre."""
    (rows, columns), (height, width) = at.frame, at.image
    made = torch.full((rows, columns), fill, dtype=values.dtype)
    for r in range(at.part[0]):
        for c in range(at.part[1]):
            y = int((r + at.top + 0.5) * height / at.scaled[0])
            x = int((c + at.left + 0.5) * width / at.scaled[1])
            x = width - 1 - min(x, width - 1) if at.flipped else min(x, width - 1)
            made[r, c] = values[min(y, height - 1), x]
    return made


@pytest.mark.parametrize("key", range(8))
def test_image_maps_and_boxes_move_together(key):
    """A bright rectangle on black is found where its box and its mask are."""
    image = torch.zeros(1, 40, 60)
    image[:, 10:30, 20:50] = 1
    mask = image[0].bool()
    at = draw_placement((40, 60), JITTER, key)
    placed = place(image, {"mask": mask, "depth": image[0]}, torch.tensor([[20.0, 10, 50, 30]]), at)
    assert torch.equal(placed.maps["mask"], by_loops(mask, at, False))
    assert torch.equal(placed.maps["depth"], by_loops(image[0], at, 0.0))
    assert torch.equal(placed.image.isnan()[0], at.padding)
    bright = (placed.image[0].nan_to_num() > 0.5)[None].byte()
    if bool(bright.any()):
        assert (mask_boxes(bright) - placed.boxes).abs().max() <= 1
    assert at == draw_placement((40, 60), JITTER, key)


def test_jitter_covers_its_range_and_frames_what_fits():
    found = [draw_placement((40, 60), JITTER, fold(3, n)) for n in range(400)]
    factors = [at.scaled[1] / 40 for at in found]  # 60 columns just fit into 40
    assert 0.3 <= min(factors) < 0.35
    assert 1.95 < max(factors) <= 2.0
    assert 0.4 < np.mean([at.flipped for at in found]) < 0.6
    assert {at.top for at in found if at.scaled[0] > 50} > {0}
    at = fitted((40, 60), (32, 40))
    assert (at.scaled, at.part, at.top, at.left) == ((27, 40), (27, 40), 0, 0)


def test_missing_pixels_stay_missing():
    image = torch.rand(2, 40, 60)
    image[0, 5:20, 5:20] = torch.nan
    at = fitted((40, 60), (40, 60))
    placed = place(image, {}, torch.zeros(0, 4), at)
    assert torch.equal(placed.image.isnan(), image.isnan())


def test_a_batch_is_a_function_of_seed_epoch_and_index(made):
    source = opened(made)
    images = JitteredObjects(source, JITTER, 3, seed=5, masks=True)
    part = Part([(0, 4), (1, 2)], Places(0, 2, 0, 2), 0)
    batch = images.__getitems__(part)
    alone = images.__getitems__(Part([(1, 2)], Places(0, 1, 0, 1), 0))
    views, own = batch.views, alone.views
    assert views.crops[0].shape == (2, 3, 32, 40)
    assert views.crops[0].dtype == torch.uint8
    assert torch.equal(views.crops[0][1], own.crops[0][0])
    first, count = views.drawn["count"].tolist()
    assert count == own.drawn["count"].item()
    for name in ("boxes", "classes", "masks"):
        assert torch.equal(views.drawn[name][first:], own.drawn[name])
    masks = unpacked(views.drawn["masks"], 40)
    assert masks.shape == (first + count, 32, 40)
    assert torch.equal(mask_boxes(masks), views.drawn["boxes"])
    sample = images.sample(2, fold(5, 1, 2))
    assert torch.equal(views.missing[0][1, 0], sample.padding)


def test_an_image_of_another_size_than_annotated_is_refused(made, tmp_path):
    root = tmp_path
    spec = coco_at(root, count=2)
    Image.new("RGB", (20, 30)).save(root / "images/1.png")
    images = WholeImages(open_source(spec), (32, 32), 3)
    with pytest.raises(UserError, match="has 30x20 pixels, its annotations are for 48x64"):
        images.__getitems__([0, 1])


def test_images_of_any_channels_and_missing_pixels(tmp_path):
    content = content_of(tmp_path, count=2)
    for n, image in enumerate(content["images"]):
        values = np.full((48, 64, 5), 7.0, np.float32)
        values[:20, :, n] = np.nan
        np.save(tmp_path / f"images/{n}.npy", values)
        image["file_name"] = f"{n}.npy"
    source = open_source(written(tmp_path, content), DataConfig(channels=5))
    jitter = Jitter((32, 40), (1.0, 1.0), 0.0)
    views = JitteredObjects(source, jitter, 5, seed=0, masks=True).__getitems__([(0, 0)]).views
    assert views.crops[0].shape == (1, 5, 32, 40)
    missing = views.missing[0][0]
    assert missing[:, 30:].all()  # 48 x 64 fit as 30 x 40
    assert missing[0, :12].all()
    assert not missing[1:, :30].any()


def test_a_damaged_image_is_replaced_and_named(tmp_path):
    spec = coco_at(tmp_path, count=3)
    (tmp_path / "images/1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    images = JitteredObjects(open_source(spec), JITTER, 3, seed=0, masks=False)
    batch = images.__getitems__([(0, 1)])
    assert list(batch.bad) == [1]
    assert "masks" not in batch.views.drawn
    assert WholeImages(open_source(spec), (32, 32), 3).__getitems__([1]).bad.keys() == {1}
