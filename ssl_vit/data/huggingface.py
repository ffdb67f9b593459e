"""Hugging Face source: data sets of `datasets`, by name or as saved folders."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ssl_vit.common.errors import UserError, check
from ssl_vit.common.reading import ReadConfig
from ssl_vit.data.base import Item, Source
from ssl_vit.data.decode import BadImage
from ssl_vit.data.hf_columns import image_column, image_folder, read_labels

log = logging.getLogger("ssl_vit")
# Names by which data sets call the same split.
_SAME = (("train", "training"), ("validation", "val", "valid", "dev"), ("test", "testing"))
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")


class HuggingFaceSource(Source):
    """Hugging Face source: images are encoded bytes.

    ``folder``: of images that are given by paths which are not absolute.
    """

    def __init__(self, spec: str, dataset: Any, column: str, folder: Path) -> None:
        import datasets

        self.spec, self.column, self.folder = spec, column, folder
        images = dataset.select_columns([column])
        self.dataset = images.cast_column(column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> Item:
        try:
            image = self.dataset[i][self.column]
            if image is None:
                raise BadImage("is missing: the row holds no image")
            data = image["bytes"]
            if data is None:
                data = (self.folder / image["path"]).read_bytes()
            return data, self.label(i)
        except (OSError, ValueError, TypeError) as error:
            raise BadImage(f"cannot be read: {error}") from error

    def name(self, i: int) -> str:
        return f"{self.spec}[{i}]"


def open_hf(spec: str, rest: str, reading: ReadConfig | None = None) -> HuggingFaceSource:
    """Open `hf:NAME_OR_PATH[#CONFIG][:SPLIT]`: a folder of `save_to_disk`, or what `load_dataset`
    takes. ``reading``: the columns of images and labels.

    Raises:
        UserError: `datasets` is not installed, there is no such data set or split, or it is not
            clear which column has the images or labels.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{spec!r} needs: pip install 'ssl_vit[hf]' ({error})") from error

    reading = reading or ReadConfig()
    name, config, split = _parts(rest)
    try:
        dataset = _load(datasets, spec, name, config, split)
    except UserError:
        raise
    except Exception as error:  # errors of datasets, pyarrow and the network
        raise UserError(f"{spec!r}: {_one_line(error, name)}") from error
    check(len(dataset) > 0, f"{spec!r} holds no image")
    column = image_column(spec, dataset, reading.image)
    folder = image_folder(spec, dataset, column, Path(name).expanduser())
    source = HuggingFaceSource(spec, dataset, column, folder)
    found = read_labels(spec, dataset, column, reading.label_column)
    source.labels, source.targets, source.classes, source.labels_from = found
    return source


def _parts(rest: str) -> tuple[str, str, str]:
    """Name, configuration and split of `NAME#CONFIG:SPLIT`; an existing path is a name."""
    if Path(rest).expanduser().exists():
        return rest, "", ""
    whole, _, split = rest.partition(":")
    if Path(whole).expanduser().exists():
        return whole, "", split
    name, _, config = whole.partition("#")
    return name, config, split


def _one_line(error: Exception, name: str) -> str:
    """Message of an error of `datasets` in one line, in this package's terms."""
    text = " ".join(str(error).split())
    if "Config name is missing" in text or "BuilderConfig" in text:
        known = text[text.find("[") : text.find("]") + 1]
        return f"its configurations are {known}; give one as hf:{name}#CONFIG"
    return text


def _load(datasets: Any, spec: str, name: str, config: str, split: str) -> Any:
    folder = Path(name).expanduser()
    if any((folder / file).is_file() for file in _SAVED):
        check(not config, f"{spec!r}: a saved data set has no configurations, drop '#{config}'")
        dataset = datasets.load_from_disk(str(folder))
        if isinstance(dataset, datasets.DatasetDict):
            return dataset[_choose_split(spec, list(dataset), split)]
        if split not in ("", str(dataset.split)):
            raise UserError(f"{spec!r}: this folder holds one split, drop ':{split}'")
        return dataset
    given = [str(folder) if folder.exists() else name] + ([config] if config else [])
    try:
        return datasets.load_dataset(*given, split=split or "train")
    except ValueError as error:
        if "Unknown split" not in str(error) or "[" in split:
            raise
    known = datasets.get_dataset_split_names(*given)
    return datasets.load_dataset(*given, split=_choose_split(spec, known, split))


def _choose_split(spec: str, known: list[str], split: str) -> str:
    """Split asked for, under any of its usual names; without one train, or the only one.

    Raises:
        UserError: there is none; the error lists them.
    """
    names = next((names for names in _SAME if (split or "train") in names), (split,))
    found = [name for name in (split or "train", *names) if name in known]
    if not split and len(known) == 1:
        found = found or known
    if not found:
        raise UserError(f"{spec!r}: no split {split or 'train'!r}, only: {', '.join(known)}")
    if found[0] != (split or "train"):
        log.info("%s: its split %r is taken", spec, found[0])
    return found[0]
