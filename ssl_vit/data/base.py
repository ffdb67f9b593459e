"""Image sources: the common interface, subsets, held-out splits, and compact name lists."""

import io
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from ssl_vit.common.errors import UserError
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.draws import Mix
from ssl_vit.data.raster import BadImage

Item = tuple[bytes | bytearray | np.ndarray, int | None]


class Source:
    """Image source: a map-style collection of images, read by index.

    Picklable, and cheap to share by fork: data that grow with the number of images are arrays, as a
    Python object per image would be copied into each worker when its reference count changes.

    Attributes:
        spec: the string given by the user.
        reading: how its files become images and labels.
        classes: class names, None when unlabelled.
        labels: int64 (n,), -1 where unknown, available without reading images; None when no image
            has one.
        targets: float32 (n, L), where an image may have several of L labels: 1, 0, NaN for unknown;
            ``classes`` are then their names, and ``labels`` is None.
        whole: the source of whole files, where an image is one plane of a file; else None.
        file_of: int64 (n,), the file of each image in ``whole``; None without it.
        groups: int64 (n,), equal for images of one group (``data.groups``): a patient, a scene. The
            same group has the same number in every source; a negative one is of an image (or file)
            that is by itself. None where no groups are asked for.
        mix: the sources of a mixed one, and how often each is drawn from; else None.
        labels_from: where the labels are from; or, without labels, why there are none.
        starts: int64 (shards + 1,), where its images lie in shards, in a row; shard s has those
            from starts[s] to before starts[s+1]. Else None.
        apart: why its images cannot be drawn from all shards at once; empty where they can.
    """

    spec: str
    reading: ReadConfig = ReadConfig()
    classes: tuple[str, ...] | None = None
    labels: np.ndarray | None = None
    targets: np.ndarray | None = None
    whole: "Source | None" = None
    file_of: np.ndarray | None = None
    groups: np.ndarray | None = None
    mix: Mix | None = None
    labels_from: str = ""
    starts: np.ndarray | None = None
    apart: str = ""

    def inherit(self, source: "Source", of: np.ndarray | None = None) -> None:
        """Take over what is known of another source and of its images. ``of``: int (n,), which of
        them each image here is, or is a part of; None: all, in their order."""

        def taken(values: np.ndarray | None) -> np.ndarray | None:
            return values if values is None or of is None else values[of]

        self.spec, self.reading, self.classes = source.spec, source.reading, source.classes
        self.labels_from, self.apart = source.labels_from, source.apart
        self.labels, self.targets = taken(source.labels), taken(source.targets)
        self.whole, self.file_of = source.whole, taken(source.file_of)
        self.groups = taken(source.groups)
        self.mix = source.mix if source.mix is None or of is None else source.mix.take(of)
        self.starts = source.starts if of is None else None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, i: int) -> Item:
        """Return image i as encoded bytes or as an array (H, W) or (H, W, C), and its label.

        Raises:
            BadImage: the image cannot be read.
        """
        raise NotImplementedError

    def stream(self, i: int) -> io.IOBase:
        """Return what image i is read from, for those who need only a part of it.

        Raises:
            BadImage: the image cannot be read, or is no file.
        """
        raw = self.read(i)[0]
        if isinstance(raw, np.ndarray):
            raise BadImage("is an array, not a file")
        return io.BytesIO(raw)

    def expect(self, images: Sequence[int] | np.ndarray) -> None:
        """Prepare for images that are read soon: those in the network are fetched ahead."""

    def name(self, i: int) -> str:
        """Return the name of image i for the log."""
        raise NotImplementedError

    def inner_name(self, i: int) -> str:
        """Return the name of image i within the source, where that differs: wherever the source
        is, it is the same."""
        return self.name(i)

    def listing(self) -> Iterable[np.ndarray]:
        """Arrays that identify the images, in their order, known without reading one: names within
        the source, sizes. None of them depends on where the source is."""
        return ()

    def label(self, i: int) -> int | None:
        """Return the label of image i, None when unknown."""
        return None if self.labels is None or self.labels[i] < 0 else int(self.labels[i])

    def target(self, i: int) -> Tensor:
        """Return what is known of each pixel of image i, (H, W): its class, or how far it is.

        Only of sources whose images have such maps beside them.

        Raises:
            BadImage: the map cannot be read.
        """
        raise NotImplementedError


class Subset(Source):
    """Subset of a source: its images at `indices`, int (n,), in that order."""

    def __init__(self, source: Source, indices: np.ndarray):
        indices, spec = np.asarray(indices, dtype=np.int64), source.spec
        if isinstance(source, Subset):  # a single look-up, however often it was split
            indices = source.indices[indices]
            source = source.source
        self.source: Source = source
        self.indices: np.ndarray = indices
        self.inherit(source, indices)
        self.spec = spec  # a part may have a name of its own
        if source.starts is not None and bool((np.diff(indices) > 0).all()):
            self.starts = np.searchsorted(indices, source.starts)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, i: int) -> Item:
        return self.source.read(int(self.indices[i]))

    def expect(self, images: Sequence[int] | np.ndarray) -> None:
        self.source.expect(self.indices[np.asarray(images, dtype=np.int64)])

    def name(self, i: int) -> str:
        return self.source.name(int(self.indices[i]))

    def inner_name(self, i: int) -> str:
        return self.source.inner_name(int(self.indices[i]))

    def target(self, i: int) -> Tensor:
        return self.source.target(int(self.indices[i]))


class Numbered(Source):
    """Numbered source: an image is read with its index as label, by which targets are looked up.

    An unreadable image is replaced by another one, with that one's index.
    """

    def __init__(self, source: Source) -> None:
        self.inherit(source)
        self.source, self.labels = source, None

    def __len__(self) -> int:
        return len(self.source)

    def read(self, i: int) -> Item:
        return self.source.read(i)[0], i

    def expect(self, images: Sequence[int] | np.ndarray) -> None:
        self.source.expect(images)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def inner_name(self, i: int) -> str:
        return self.source.inner_name(i)

    def target(self, i: int) -> Tensor:
        return self.source.target(i)


def split_holdout(source: Source, count: int, seed: int, parts: int = 10) -> tuple[Subset, Subset]:
    """Split a source into (train, held out): `count` images by `seed`, at most one in `parts`.

    Both keep the order of the source. With fewer than `parts` images none is held out. What belongs
    together (:func:`units`) is held out together: whole groups, or files with all their planes, at
    least one, and none of fewer than `parts`.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, is {count}")
    # RandomState, because its stream is frozen: a newer numpy must not move held-out images
    # into the training set of a resumed run.
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    held = min(count, len(source) // parts)
    if (together := units(source)) is None:
        order = random.permutation(len(source))
        return Subset(source, np.sort(order[held:])), Subset(source, np.sort(order[:held]))
    numbers, unit_of, sizes = np.unique(together, return_inverse=True, return_counts=True)
    order = random.permutation(len(numbers))
    if count == 0 or len(numbers) < parts:
        chosen = order[:0]
    elif source.groups is None:
        chosen = order[: max(1, int((np.cumsum(sizes[order]) <= held).sum()))]
    else:  # they may be of any size: a large one is passed over
        fit = fitting(sizes[order], held)
        chosen = order[fit if fit.any() else [np.argmin(sizes[order])]]
    out = np.isin(unit_of, chosen)
    return Subset(source, np.flatnonzero(~out)), Subset(source, np.flatnonzero(out))


def too_few(source: Source, parts: int = 10) -> str:
    """Reason why :func:`split_holdout` holds out no image of a source; empty if it does."""
    together = units(source)
    if together is None:
        count, what = len(source), "images"
    else:
        count, what = len(np.unique(together)), "files" if source.groups is None else "groups"
    return f"{count} {what}, fewer than {parts}" if count < parts else ""


def epoch_length(source: Source) -> int:
    """Images of an epoch: all, each once or, of mixed sources, as often as they are drawn."""
    return len(source) if source.mix is None else sum(source.mix.draws)


def units(source: Source) -> np.ndarray | None:
    """Units that must not be split, int64 (n,): the group of each image or, without groups, the
    file of each plane; None where every image is by itself."""
    return source.file_of if source.groups is None else source.groups


def fitting(sizes: np.ndarray, room: int) -> np.ndarray:
    """Mask of those taken, bool (n,), if each in turn is taken that still fits into ``room``."""
    taken = np.zeros(len(sizes), dtype=bool)
    for i, size in enumerate(sizes.tolist()):
        if size <= room:
            taken[i], room = True, room - size
    return taken


def check_classes(train: Source, val: Source) -> None:
    """Check that two sources whose masks hold class numbers have the same classes.

    One may have additional classes at the end.

    Raises:
        UserError: the first class that differs is named.
    """
    if train.classes is None or val.classes is None:
        return
    for number, (ours, theirs) in enumerate(zip(train.classes, val.classes, strict=False)):
        if ours != theirs:
            raise UserError(
                f"class {number} is {ours!r} in {train.spec} and {theirs!r} in {val.spec}; "
                "both must have the same classes"
            )


def known_labels(source: Source) -> np.ndarray:
    """Images whose label is known, bool (n,); of several labels: any of them."""
    if source.targets is not None:
        return ~np.isnan(source.targets).all(1)
    return np.zeros(len(source), dtype=bool) if source.labels is None else source.labels >= 0


def describe_labels(source: Source) -> str:
    """Labels of a source in a line: how many classes, and what was taken for them."""
    origin = source.labels_from
    if source.labels is None and source.targets is None:
        return f"none: {origin}" if origin else "none"
    count = len(source.classes or ())
    what = f"{count:,} classes" if source.targets is None else f"{count:,} labels, several an image"
    unknown = len(source) - int(known_labels(source).sum())
    rest = f"; unknown for {unknown:,} of {len(source):,} images" if unknown else ""
    return what + (f", from {origin}" if origin else "") + rest
