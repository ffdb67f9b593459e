"""Library sources: data sets of torchvision and Hugging Face."""

import contextlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssl_vit.common.errors import UserError, did_you_mean
from ssl_vit.data.base import Item, Source
from ssl_vit.data.decode import BadImage

# Attributes in which torchvision's data sets have their labels, the most common first.
_LABELS = ("targets", "labels", "_labels", "_samples", "samples")
_ALIASES = {"test": ("test", "val"), "val": ("val", "valid", "test")}


class TorchvisionSource(Source):
    """torchvision source: a data set of torchvision; images are arrays."""

    def __init__(self, spec: str, dataset: Any):
        self.spec, self.dataset = spec, dataset
        self.labels = _torchvision_labels(dataset)
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
            raise BadImage(f"{type(error).__name__}: {error}") from error

    def name(self, i: int) -> str:
        return f"{self.spec}[{i}]"


def open_torchvision(spec: str, rest: str) -> TorchvisionSource:
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
            return _complete(labels)
    return None


def _complete(labels: np.ndarray) -> np.ndarray | None:
    """Labels as int64; None where one is missing (marked by a negative number)."""
    return None if labels.min() < 0 else labels.astype(np.int64)


def _class_names(labels: np.ndarray, names: Any) -> tuple[str, ...]:
    count = int(labels.max()) + 1
    if names is not None and len(names) >= count:
        return tuple(name if isinstance(name, str) else str(name) for name in names)
    return tuple(str(label) for label in range(count))


class HuggingFaceSource(Source):
    """Hugging Face source: a data set of `datasets`; images are encoded bytes."""

    def __init__(self, spec: str, dataset: Any, image_column: str, label_column: str | None):
        self.spec, self.column = spec, image_column
        feature = type(dataset.features[image_column])
        images = dataset.select_columns([image_column])
        self.dataset = images.cast_column(image_column, feature(decode=False))
        if label_column is not None:
            table = dataset.select_columns([label_column]).with_format("arrow")[:]
            labels = table.column(label_column).fill_null(-1).to_numpy()
            self.labels = _complete(labels) if len(labels) else None
        if self.labels is not None:
            self.classes = _class_names(self.labels, dataset.features[label_column].names)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> Item:
        try:
            image = self.dataset[i][self.column]
            if image is None:
                raise BadImage("is missing: the row holds no image")
            data = image["bytes"]
            return (data if data is not None else Path(image["path"]).read_bytes()), self.label(i)
        except (OSError, ValueError, TypeError) as error:
            raise BadImage(f"cannot be read: {error}") from error

    def name(self, i: int) -> str:
        return f"{self.spec}[{i}]"


def open_hf(spec: str, rest: str) -> HuggingFaceSource:
    """Open `hf:NAME_OR_PATH[:SPLIT]`: a folder of `save_to_disk`, or what `load_dataset` takes.

    Raises:
        UserError: `datasets` is not installed, there is no such data set or split, or no image.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{spec!r} needs: pip install 'ssl_vit[hf]' ({error})") from error

    name, _, split = rest.partition(":")
    if Path(rest).expanduser().exists():
        name, split = rest, ""
    try:
        dataset = _load_hf(datasets, spec, name, split)
    except UserError:
        raise
    except Exception as error:  # errors of datasets, pyarrow and the network
        raise UserError(f"{spec!r}: {' '.join(str(error).split())}") from error
    columns = dataset.features.items()
    images = [column for column, feature in columns if isinstance(feature, datasets.Image)]
    labels = [column for column, feature in columns if isinstance(feature, datasets.ClassLabel)]
    if not images:
        raise UserError(f"{spec!r} has no image column, only: {', '.join(dataset.features)}")
    if not len(dataset):
        raise UserError(f"{spec!r} holds no image")
    return HuggingFaceSource(spec, dataset, images[0], labels[0] if labels else None)


def _load_hf(datasets: Any, spec: str, name: str, split: str) -> Any:
    folder = Path(name).expanduser()
    saved = ("dataset_info.json", "state.json", "dataset_dict.json")
    if not any((folder / file).is_file() for file in saved):
        name = str(folder) if folder.exists() else name
        return datasets.load_dataset(name, split=split or "train")
    dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, datasets.DatasetDict):
        with contextlib.suppress(KeyError):
            return dataset[split or "train"]
        raise UserError(f"{spec!r}: no split {split or 'train'!r}, only: {', '.join(dataset)}")
    if split not in ("", str(dataset.split)):
        raise UserError(f"{spec!r}: this folder holds one split, drop ':{split}'")
    return dataset
