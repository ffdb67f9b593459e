"""torchvision source: data sets of torchvision that are on disk."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssl_vit.common.errors import UserError, did_you_mean
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.base import Item, Source
from ssl_vit.data.decode import BadImage
from ssl_vit.data.raster import reason

# Attributes in which torchvision's data sets have their labels, the most common first.
_LABELS = ("targets", "labels", "_labels", "_samples", "samples")
_ALIASES = {"test": ("test", "val"), "val": ("val", "valid", "test")}


class TorchvisionSource(Source):
    """torchvision source: a data set of torchvision; images are arrays."""

    def __init__(self, spec: str, dataset: Any):
        self.spec, self.dataset = spec, dataset
        self.labels = _torchvision_labels(dataset)
        self.labels_from = (
            "the data set" if self.labels is not None else "the data set has no class numbers"
        )
        if self.labels is not None:
            self.classes = _class_names(self.labels, getattr(dataset, "classes", None))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> Item:
        try:
            image = self.dataset[i][0]
            if isinstance(image, Image.Image) and image.mode in ("1", "P", "PA", "LA", "CMYK"):
                image = image.convert("L" if image.mode == "1" else "RGB")
            return np.asarray(image), self.label(i)
        except Exception as error:  # data sets raise all kinds, depending on their format
            raise BadImage(reason(error)) from error

    def name(self, i: int) -> str:
        return f"{self.spec}[{i}]"


def open_torchvision(spec: str, rest: str, reading: ReadConfig | None = None) -> TorchvisionSource:
    """Open `torchvision:NAME:ROOT[:SPLIT]`; nothing is downloaded.

    Raises:
        UserError: no such data set or split, or its files are not in ROOT.
    """
    name, _, place = rest.partition(":")
    kind = _torchvision_class(spec, name)
    root, split = _root_and_split(place)
    if not root:
        raise UserError(f"{spec!r} lacks the folder: torchvision:{name}:ROOT[:SPLIT]")
    parameters = inspect.signature(kind.__init__).parameters
    needed = [
        parameter.name
        for parameter in list(parameters.values())[1:]
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.name not in ("root", "split")
    ]
    if needed or "root" not in parameters:
        raise UserError(f"{spec!r}: torchvision's {name} takes other arguments than root and split")
    options: dict[str, object] = {"root": str(Path(root).expanduser())}
    if "download" in parameters:
        options["download"] = False
    return TorchvisionSource(spec, _construct(spec, kind, options, split, parameters))


def _torchvision_class(spec: str, name: str) -> Any:
    from torchvision import datasets

    known = [
        known
        for known in datasets.__all__
        if inspect.isclass(kind := getattr(datasets, known))
        and issubclass(kind, datasets.VisionDataset)
    ]
    if name not in known:
        same = [other for other in known if other.lower() == name.lower()]
        hint = f" (nearest known: {same[0]})" if same else did_you_mean(name, known)
        raise UserError(f"{spec!r}: torchvision has no data set {name!r}{hint}")
    return getattr(datasets, name)


def _root_and_split(place: str) -> tuple[str, str]:
    root, _, split = place.rpartition(":")
    if not root or "/" in split or Path(place).expanduser().exists():  # a colon within the path
        return place, ""
    return root, split


def _construct(
    spec: str, kind: Any, options: dict[str, object], split: str, parameters: Any
) -> Any:
    """Construct the data set, by the way it names its splits."""
    variants: list[dict[str, object]] = [{}]
    if "train" in parameters:
        if split not in ("", "train", "val", "test"):
            raise UserError(f"{spec!r}: the split {split!r} is none of train, val, test")
        variants = [{"train": split in ("", "train")}]
    elif "split" in parameters:
        variants = [{"split": alias} for alias in _ALIASES.get(split, (split or "train",))]
    elif split not in ("", "train"):
        raise UserError(f"{spec!r}: torchvision's {kind.__name__} has no splits, drop ':{split}'")
    refused: Exception | None = None
    for variant in variants:
        try:
            return kind(**options, **variant)
        except ValueError as error:  # torchvision raises it for an unknown split
            refused = refused or error
        except (OSError, RuntimeError, ImportError) as error:
            raise UserError(_missing(spec, kind.__name__, options, variant, error)) from error
    raise UserError(f"{spec!r}: {refused}".replace("\n", " ")) from refused


def _missing(
    spec: str, name: str, options: dict[str, object], variant: dict[str, object], error: Exception
) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    arguments = [repr(options["root"])] + [f"{key}={value!r}" for key, value in variant.items()]
    if "download" not in options:
        return f"{spec!r}: torchvision cannot open {name}: {reason}"
    code = f"import torchvision.datasets as d; d.{name}({', '.join(arguments)}, download=True)"
    return f'{spec!r}: torchvision cannot open {name}: {reason} Fetch it with: python -c "{code}"'


def _torchvision_labels(dataset: Any) -> np.ndarray | None:
    """Class number of each image, from the data set's lists; None where there is none."""
    for attribute in _LABELS:
        values = getattr(dataset, attribute, None)
        if values is None or len(values) != len(dataset):
            continue
        if attribute in ("_samples", "samples"):
            values = [sample[1] for sample in values]
        try:
            labels = np.asarray(values)
        except ValueError:  # several values per image, of unlike lengths
            continue
        if labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels):
            return _known(labels)
    return None


def _known(labels: np.ndarray) -> np.ndarray | None:
    """Labels as int64, -1 for all negative numbers, which mark missing ones; None if all are."""
    return None if labels.max() < 0 else np.maximum(labels.astype(np.int64), -1)


def _class_names(labels: np.ndarray, names: Any) -> tuple[str, ...]:
    count = int(labels.max()) + 1
    if names is not None and len(names) >= count:
        return tuple(name if isinstance(name, str) else str(name) for name in names)
    return tuple(str(label) for label in range(count))
