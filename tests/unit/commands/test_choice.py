"""Images that are held out to choose the best encoder by: which, how many, and what is said."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssl_vit.commands import beginning
from ssl_vit.commands.pretraining import Pretraining
from ssl_vit.data.base import Source
from ssl_vit.data.loader import train_batches
from ssl_vit.data.sources import DigitsSource
from tests.contract import tiny

VAL = ("--data.val", "digits:val", "--data.holdout", "500")
NO_VAL = ("--data.val", "", "--data.holdout", "500")
LEAVE_ONE_OUT = "chosen by leave-one-out k-NN of training images: "


@pytest.fixture(scope="module")
def start() -> tuple[str, ...]:
    """Options that begin with given weights."""
    return ("--init.encoder", str(tiny.encoder_file()), "--encoder.image-size", "24")


@pytest.fixture
def made(start):
    """A tiny run that begins with given weights."""
    own = ("--encoder.patch-size", "8", "--encoder.width", "24")
    return lambda *more: tiny.session("mae", *start, *own, *more)


def names(source: Source) -> set[str]:
    return {source.name(i) for i in range(len(source))}


def plan(session: Pretraining) -> dict[str, str]:
    return dict(session.plan(session.about()))


def apart(*sets: Iterable) -> bool:
    """Whether no two of these sets have anything in common."""
    together = [one for each in sets for one in set(each)]
    return len(together) == len(set(together))


@pytest.mark.parametrize(("flags", "counts"), [(VAL, (143, 359)), (NO_VAL, (71, 72))])
def test_they_are_neither_trained_on_nor_scored(made, monkeypatch, flags, counts):
    """By what is read in an epoch of training, and at a look; the plan counts them."""
    session = made(*flags, "--optim.batch-size", "64", "--run.probe-images", "400")
    read: set[str] = set()
    before = DigitsSource.read
    monkeypatch.setattr(
        DigitsSource, "read", lambda self, i: read.add(self.name(i)) or before(self, i)
    )
    epoch = session.order.steps_per_epoch
    list(train_batches(session.training_images(), session.order, 0, epoch, 0, False))
    trained = set(read)
    assert len(trained) == epoch * 64
    watch, encoder = session.watch, session.task.exported_encoder()
    read.clear()
    watch.look(encoder)
    scored = names(watch.val)
    assert read == names(watch.train) | scored
    read.clear()
    watch.look(encoder, select=True)
    chosen = read - names(watch.train) - scored
    assert chosen == names(watch.choice)
    assert apart(trained | names(session.images.train), chosen, scored)
    choice, val = counts
    assert (len(session.images.train), len(chosen), len(scored)) == (1295, choice, val)
    assert plan(session)["images"] == (
        f"1,295 train, {val} held out, {choice} more to choose the best encoder by"
    )
    assert plan(session)["best encoder"] == (
        f"chosen by k-NN of {choice} images held out for this alone"
    )


def test_the_choice_is_by_their_k_nn_among_the_training_images(made):
    session = made(*VAL, "--run.probe-images", "150")
    watch, encoder = session.watch, session.task.exported_encoder()
    assert len(watch.choice) == 143
    numbers = replace(watch, val=watch.choice).look(encoder).numbers
    best = max(value for name, value in numbers.items() if name.startswith("knn"))
    assert watch.look(encoder, select=True).selection == best
    assert watch.look(encoder).selection is None
    alone = replace(watch, choice=None)
    assert alone.look(encoder, select=True).selection != best
    assert alone.look(encoder).numbers == watch.look(encoder, select=True).numbers


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (
            (*VAL[:2], "--data.holdout", "0"),
            "0 with labels can be held out for it (--data.holdout 0, at most a tenth of the "
            "training images), 50 are needed",
        ),
        (
            (*NO_VAL[:2], "--data.holdout", "99"),
            "49 with labels can be held out for it (half of the 99 that are held out), 50 are "
            "needed",
        ),
        (
            (*VAL, "--optim.batch-size", "1300"),
            "--optim.batch-size 1300 leaves none to hold out for it",
        ),
    ],
)
def test_where_none_are_held_out_that_is_said_and_all_is_trained_on(made, flags, why):
    session = made(*flags)
    assert plan(session)["best encoder"] == LEAVE_ONE_OUT + why
    assert "to choose" not in plan(session)["images"]
    assert session.watch.choice is None
    given = tiny.session("mae", *flags).images
    assert names(session.images.train) == names(given.train)
    assert names(session.images.val) == names(given.val)


def test_without_labels_or_given_weights_nothing_is_held_out(made, tmp_path):
    for i in range(120):
        np.save(tmp_path / f"{i}.npy", np.full((8, 8), i, np.uint8))
    bare = made("--data.train", f"flat:{tmp_path}", *VAL)
    assert len(bare.images.train) == 120
    assert "best encoder" not in plan(bare)
    assert "k-NN" in plan(bare)
    plain = tiny.session("mae", *VAL)
    assert plain.images.choice is None
    assert plan(plain)["images"] == "1,438 train, 359 held out"
    assert "best encoder" not in plan(plain)


def patients(folder: Path, first: int, count: int) -> str:
    """Five images of each patient, of two classes, in class folders."""
    for patient in range(first, first + count):
        for i in range(5):
            path = folder / "ab"[i % 2] / f"p{patient}_{i}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.full((8, 8), 9 * i + patient, np.uint8))
    return f"folder:{folder}"


@pytest.mark.parametrize("val", [False, True])
def test_groups_stay_whole(made, tmp_path, monkeypatch, val):
    monkeypatch.setattr(beginning, "_LEAST", 5)
    train = patients(tmp_path / "train", 0, 40)
    other = patients(tmp_path / "val", 50, 4) if val else ""
    group = ("--data.group", "name:(p[0-9]+)_")
    images = made("--data.train", train, *NO_VAL, "--data.val", other, *group).images
    sets = [set(source.groups.tolist()) for source in (images.train, images.choice, images.val)]
    assert apart(*sets)
    assert [len(one) for one in sets] == ([36, 4, 4] if val else [36, 2, 2])
