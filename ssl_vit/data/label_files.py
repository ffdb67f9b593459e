"""Label files of a shard: values by column and by the key of the member that holds them."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from ssl_vit.data.classes import LABEL_NAMES, NO_CLASS
from ssl_vit.data.tar_names import split_name

_LARGEST_TEXT, _MOST_KEYS = 256, 12


class LabelFiles:
    """Values of labels by column and by the key of the member that holds them.

    Args:
        columns: keys of .json files or extensions of whole files; empty: all that are usual.
    """

    def __init__(self, columns: tuple[str, ...]) -> None:
        self.columns = columns
        self.found: dict[str, dict[str, Any]] = {}
        self.keys: list[str] = []

    def takes(self, name: str) -> bool:
        """True for members that may hold labels."""
        ending = split_name(name, full=True)[1].lower()
        return ending in ("cls", "txt", "json") or ending in self.columns

    def add(self, name: str, raw: bytes) -> None:
        """Take the labels that a member holds; ``a.cls.txt`` is the same as ``a.cls``."""
        key, ending = split_name(name, full=True)
        inner = split_name(key, full=True)
        if inner[1].lower() in LABEL_NAMES:
            key, ending = inner[0], "cls" if ending.lower() == "txt" else ending
        for column, value in self._values(ending.lower(), raw):
            self.found.setdefault(column, {})[key] = value

    def _values(self, ending: str, raw: bytes) -> Iterator[tuple[str, Any]]:
        if ending == "json":
            yield from self._of_json(raw)
        elif not self.columns or ending in self.columns:
            text = raw.decode("utf-8", "replace").strip()
            whole = text.removeprefix("-").isdecimal()
            long = len(text) > _LARGEST_TEXT
            # A text beside an image is mostly its caption: only numbers are classes unasked.
            if long or (ending == "txt" and not whole and not self.columns):
                yield f".{ending}", {NO_CLASS: "a text"}
            else:
                yield f".{ending}", int(text) if whole else text

    def _of_json(self, raw: bytes) -> Iterator[tuple[str, Any]]:
        try:
            made = json.loads(raw)
        except ValueError:  # cut or damaged: no label
            return
        if not isinstance(made, dict):
            return
        self.keys = self.keys or [str(name)[:40] for name in made][:_MOST_KEYS]
        for name, value in made.items():
            wanted = name in self.columns if self.columns else name.lower() in LABEL_NAMES
            if wanted:
                plain = isinstance(value, (str, int, float, bool)) or value is None
                small = plain and len(str(value)) <= _LARGEST_TEXT
                yield name, value if small else {NO_CLASS: f"a {type(value).__name__}"}

    def of_images(self, images: list[str]) -> tuple[dict[str, np.ndarray], dict[str, list[Any]]]:
        """Labels of images: by column, the index of each image's value, and the values.

        An image's own label comes first, then that of its WebDataset sample.
        """
        labels, values = {}, {}
        for column, by_key in self.found.items():
            number: dict[str, int] = {}
            ids = np.full(len(images), -1, dtype=np.int32)
            for i, name in enumerate(images):
                keys = (split_name(name, full=True)[0], split_name(name)[0])
                for key in keys:
                    if key in by_key:
                        ids[i] = number.setdefault(json.dumps(by_key[key]), len(number))
                        break
            labels[column], values[column] = ids, [json.loads(text) for text in number]
        return labels, values
