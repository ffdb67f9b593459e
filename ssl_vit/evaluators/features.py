"""Feature extraction: frozen features of whole data sets, with how they were computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_vit.common.distributed import gather_rows, gather_texts, rank_and_world, share
from ssl_vit.common.errors import RunFailed, UserError, check
from ssl_vit.data.base import units
from ssl_vit.data.batch import Batch
from ssl_vit.data.eval_images import EvalImages, eval_batches
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.sources import Source, Subset
from ssl_vit.data.view import View
from ssl_vit.evaluators.options import FEATURES, PATCHES
from ssl_vit.model.encoder import Encoder
from ssl_vit.model.execution import choose_attention
from ssl_vit.training.parallel import autocast, loader_workers

log = logging.getLogger("ssl_vit")
Embed = Callable[[Float[Tensor, "b c h w"]], dict[str, Tensor]]
_PIXELS = 32


@dataclass
class FeatureSet:
    """Feature set: frozen features of the readable images of a source.

    ``parts``: by name, (n, D) float32. ``labels``: (n,) classes, -1 where unknown; or (n, L) float
    for L independent labels, 1, 0, or NaN where unknown. ``index``: (n,) the images' indices in
    their source. ``unreadable``: how many images are left out. ``groups``: (n,) equal for images
    that belong together (``data.base.units``); None where every image is by itself.
    """

    parts: dict[str, Tensor]
    labels: Tensor
    unreadable: int
    index: Int64[Tensor, " n"]
    groups: Int64[Tensor, " n"] | None = None

    def feature(self, name: str) -> Float[Tensor, "n d"]:
        """Feature by name (a key of ``FEATURES``): its parts concatenated."""
        parts = [self.parts[part] for part in FEATURES[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def has(self, name: str) -> bool:
        """True if all parts of a feature are available."""
        return all(part in self.parts for part in FEATURES[name])

    def known(self) -> FeatureSet:
        """Subset of the images whose label, or one of whose labels, is known."""
        unknown = self.labels < 0 if self.labels.ndim == 1 else self.labels.isnan().all(1)
        return self.take((~unknown).nonzero()[:, 0]) if bool(unknown.any()) else self

    def take(self, rows: Int64[Tensor, " k"]) -> FeatureSet:
        """Subset of these rows, in this order."""
        parts = {name: part[rows.to(part.device)] for name, part in self.parts.items()}
        labels, index = self.labels[rows.to(self.labels.device)], self.index[rows.cpu()]
        groups = None if self.groups is None else self.groups[rows.cpu()]
        return FeatureSet(parts, labels, self.unreadable, index, groups)

    def to(self, device: torch.device) -> FeatureSet:
        """Copy on a device."""
        moved = {name: part.to(device) for name, part in self.parts.items()}
        return replace(self, parts=moved, labels=self.labels.to(device))


@dataclass(frozen=True)
class Machine:
    """Machine settings of feature extraction: device, precision, workers, batch size.

    ``at_once``: the largest batch in a process.
    """

    device: torch.device
    precision: torch.dtype
    workers: int = -1
    at_once: int = 256

    def card(self) -> dict[str, str]:
        """Device and precision for the protocol card."""
        precision = str(self.precision).removeprefix("torch.")
        return {"device": str(self.device), "precision": precision}


def pooled(encoder: Encoder, blocks: int = 1, patches: bool = False) -> Embed:
    """Pooled features of an encoder: ``cls`` where it has one, and ``mean`` of the patches.

    With ``blocks`` above 1, also [CLS] after each of the last ones: ``cls-2`` is that of the last
    but one. With ``patches`` these too, (b, N, D).
    """

    def embed(images: Tensor) -> dict[str, Tensor]:
        outputs = encoder.intermediate(images, last=blocks)
        made = {"mean": outputs[-1].pool("mean")}
        if outputs[-1].cls is not None:
            made["cls"] = outputs[-1].pool("cls")
            made |= {f"cls-{n}": outputs[-n].pool("cls") for n in range(2, blocks + 1)}
        return made | ({PATCHES: outputs[-1].patches} if patches else {})

    return embed


def pixels(images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
    """Raw pixels as features, averaged down to at most 32 x 32 pixels."""
    size = (min(_PIXELS, images.shape[2]), min(_PIXELS, images.shape[3]))
    return {"pixels": F.adaptive_avg_pool2d(images, size).flatten(1)}


def embedded(
    embed: Embed, batches: Iterable[Batch], view: View, machine: Machine
) -> Iterator[tuple[dict[str, Tensor], Batch]]:
    """Features of each batch, float32 on the CPU, with the batch; none where no image is readable.

    ``batches``: those of :class:`EvalImages`, not yet normalised.
    """
    device = machine.device
    normalize = Normalize(view.mean, view.std).to(device)
    for batch in batches:
        if not batch.views.crops:
            yield {}, batch
            continue
        with torch.inference_mode(), autocast(device, machine.precision):
            made = embed(normalize(batch.views.to(device)).crops[0])
            found = {name: part.float().cpu() for name, part in made.items()}
        yield found, batch


@torch.inference_mode()
def extract(embed: Embed, source: Source, view: View, machine: Machine) -> FeatureSet:
    """Extract features of every readable image of ``source``, in its order.

    Raises:
        UserError: no image could be read.
    """
    device, workers = machine.device, loader_workers(machine.workers, machine.device)
    images = EvalImages(source, view.size, view.crop_ratio, view.channels)
    batches = eval_batches(images, machine.at_once, workers, device.type == "cuda")
    found: dict[str, list[Tensor]] = {}
    labels, places = [], []
    bad: dict[int, str] = {}
    for made, batch in embedded(embed, batches, view, machine):
        bad |= batch.bad
        if not made:
            continue
        for name, part in made.items():
            found.setdefault(name, []).append(part)
        labels.append(batch.views.labels)
        places.append(batch.views.keys)
    for reason in list(bad.values())[:5]:
        log.warning("unreadable image skipped: %s", reason)
    if not labels:
        raise UserError(f"no image of {source.spec} can be read: {next(iter(bad.values()), '')}")
    parts = {name: torch.cat(rows) for name, rows in found.items()}
    index = torch.cat(places)
    targets = targets_of(source, index, torch.cat(labels))
    return FeatureSet(parts, targets, len(bad), index, units_of(source, index))


def extract_shared(embed: Embed, source: Source, view: View, machine: Machine) -> FeatureSet:
    """Extract features with all processes: each takes a part, and all get the whole set.

    Raises:
        UserError: there are fewer images than processes, or no image of a part can be read.
        RunFailed: in all processes, if the data workers of one fail.
    """
    world = rank_and_world()[1]
    if world == 1:
        return extract(embed, source, view, machine)
    check(len(source) >= world, f"{source.spec} has {len(source)} images for {world} processes")
    own = share(len(source))
    part = Subset(source, np.arange(own.start, own.stop))
    failure = ""
    try:
        made = extract(embed, part, view, machine)
    except RunFailed as error:
        failure = str(error)
    if failures := [text for text in gather_texts(failure) if text]:
        raise RunFailed(failures[0], everywhere=True)
    index = gather_rows(made.index + own.start)
    unreadable = int(gather_rows(torch.tensor([made.unreadable])).sum())
    parts = {name: gather_rows(rows) for name, rows in made.parts.items()}
    labels = gather_rows(made.labels)
    return FeatureSet(parts, labels, unreadable, index, units_of(source, index))


def targets_of(source: Source, index: Tensor, labels: Tensor) -> Tensor:
    """Targets of the images at ``index``: their classes, or several labels each."""
    return labels if source.targets is None else torch.from_numpy(source.targets)[index]


def units_of(source: Source, index: Int64[Tensor, " n"]) -> Int64[Tensor, " n"] | None:
    """Units (``data.base.units``) of the images at ``index``; None: each is by itself."""
    together = units(source)
    return None if together is None else torch.from_numpy(together)[index]


def ready(module: nn.Module, device: torch.device) -> None:
    """Prepare an encoder: on a device, in evaluation mode, with the fast attention there."""
    module.to(device).eval()
    choose_attention(module, device)
