"""Images of an evaluation: the central crop of each, in order, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import BatchSampler, Dataset, SequentialSampler

from ssl_vit.common.task import Views
from ssl_vit.data.augment import center_view
from ssl_vit.data.batch import Batch, stack
from ssl_vit.data.decode import BadImage, decode
from ssl_vit.data.missing import missing_in, with_data
from ssl_vit.data.sources import Source
from ssl_vit.data.workers import load


class EvalImages(Dataset):
    """The central crop of every image, in order; unreadable ones are left out and reported."""

    def __init__(
        self, source: Source, size: tuple[int, int], crop_ratio: float, channels: int
    ) -> None:
        self.source, self.size, self.crop_ratio, self.channels = source, size, crop_ratio, channels

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these images: one kind of crop, the key being the index."""
        bad: dict[int, str] = {}
        crops, keys, labels = [], [], []
        for index in indices:
            try:
                raw, label = self.source.read(index)
                image = decode(raw, self.channels, self.source.reading)
                view = center_view(image, self.size, self.crop_ratio)
                crops.append(with_data(view, "the central crop"))
            except BadImage as error:
                bad[index] = f"{self.source.name(index)}: {error}"
                continue
            keys.append(index)
            labels.append(-1 if label is None else label)
        if not crops:
            return Batch(Views([], torch.tensor([]).long(), torch.tensor([]).long()), bad)
        made = [stack(crops)]
        views = Views(made, torch.tensor(keys), torch.tensor(labels), missing=missing_in(made))
        return Batch(views, bad)


def eval_batches(images: EvalImages, batch_size: int, workers: int, pin: bool) -> Iterator[Batch]:
    """All images of an evaluation set in order; a batch without a readable image is empty."""
    batches = BatchSampler(SequentialSampler(images.source), batch_size, drop_last=False)
    return load(images, batches, workers, pin)
