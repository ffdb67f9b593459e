"""Task: a module that the training loop trains; its forward returns its losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from ssl_vit.common.seeds import fold, fold_keys


class Place(NamedTuple):
    """Place of a parameter in what is trained, by which options scale its learning rate.

    ``encoder``: it is the encoder's, which may come with given weights, not of a head beside it.
    ``above``: blocks from it to the end, its own included; 0 after the last one, and in heads.
    ``patches``: it is of the patch embedding.
    """

    encoder: bool = False
    above: int = 0
    patches: bool = False


@dataclass
class Views:
    """A batch as a task sees it: B samples, and n crops of each of a kind, view by view (all
    samples' first crops, then all second ones).

    Attributes:
        crops: one (n B, C, H, W) tensor for each kind of crop; uint8 (or float in the image's own
            scale) from the workers, normalised float after the device half.
        keys: (B,) one random key for each sample, a function of (seed, epoch, image), to draw with
            (``seeds.uniform``).
        labels: (B,) class, -1 where there is none.
        photometric: for each kind of crop the parameters of its photometric operations,
            (n B, WIDTH) of ``data.photometric``, with LEVELS_WIDTH more of ``data.levels`` for a
            kind that has those, or (n B, 0) for one that has none; empty in evaluation, and after
            the device half.
        key: one random key for the whole batch, a function of ``keys`` that is known without asking
            the device; 0 in evaluation.
        drawn: by name, (B, ...): what the method drew for each sample in the workers
            (``Method.draw``: masks, index sets), or for all together, of any shape
            (``Method.draw_together``); empty in evaluation.
        boxes: for each kind of crop (n B, 5) float32: top, left, height and width of the crop in
            its image, as shares of the image's sides, and 1 where it is flipped (2: upside down,
            3: both ways), plus 4 for each quarter turn counter-clockwise after that; empty in
            evaluation. For losses between places that two crops share.
        missing: for each kind of crop (n B, C, H, W) bool: True where a value is missing, which is
            NaN in crops from the workers, and 0 after the device half; empty where no value of the
            batch is, which is known without asking the device.
    """

    crops: list[Tensor]
    keys: Int64[Tensor, " b"]
    labels: Int64[Tensor, " b"]
    photometric: list[Tensor] = field(default_factory=list)
    key: int = 0
    drawn: dict[str, Tensor] = field(default_factory=dict)
    boxes: list[Tensor] = field(default_factory=list)
    missing: list[Tensor] = field(default_factory=list)

    def part(self, kinds: slice, name: str = "") -> Views:
        """The same samples with these kinds of crops, and with what was drawn as ``name.*``, if a
        name is given: what one of several objectives sees."""
        start = f"{name}." if name else ""
        drawn = {k.removeprefix(start): v for k, v in self.drawn.items() if k.startswith(start)}
        return replace(
            self,
            crops=self.crops[kinds],
            photometric=self.photometric[kinds],
            boxes=self.boxes[kinds],
            missing=self.missing[kinds],
            drawn=drawn,
        )

    def missing_of(self, kind: int) -> Tensor | None:
        """``missing`` of a kind of crop; None: none of its values is."""
        return self.missing[kind] if self.missing else None

    def redrawn(self, i: int) -> Views:
        """The same batch with other keys: an independent draw for each ``i``."""
        return replace(self, keys=fold_keys(self.keys, i), key=fold(self.key, i))

    def to(self, device: torch.device) -> Views:
        """The same batch on ``device``; copies from pinned memory do not block.

        To CUDA photometric parameters do not go: by them the host picks the images of each
        operation, which it could not without waiting for the device.
        """
        free = device.type == "cuda"
        moving = replace(self, photometric=[]) if free else self
        moved = moving._each(lambda tensor: tensor.to(device, non_blocking=free))
        return replace(moved, photometric=self.photometric) if free else moved

    def pin_memory(self) -> Views:
        """The same batch in page-locked memory."""
        return self._each(Tensor.pin_memory)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Views:
        return Views(
            [change(c) for c in self.crops],
            change(self.keys),
            change(self.labels),
            [change(p) for p in self.photometric],
            self.key,
            {name: change(d) for name, d in self.drawn.items()},
            [change(b) for b in self.boxes],
            [change(m) for m in self.missing],
        )

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self._each(keep)
        return found


class Task(nn.Module):
    """All that the loop knows of what it trains.

    Attributes:
        progress: names of the scalars, beside the loss, that the progress line shows.
        peak_in_warmup: whether the last step of the warm-up has the peak learning rate already
            (as in the original DINO), or the first one after it (as in the original MAE).
    """

    progress: ClassVar[tuple[str, ...]] = ()
    peak_in_warmup: ClassVar[bool] = False

    def forward(self, views: Views, step: int) -> dict[str, Tensor]:
        """Scalars on the device, among them ``loss``, which is minimised."""
        raise NotImplementedError

    def set_length(self, steps: int, steps_per_epoch: int) -> None:
        """Called before the first step: how long the training will be."""

    def before_update(self, step: int) -> None:
        """Called with gradients in place, before they are clipped and applied."""

    def after_update(self, step: int, took: Bool[Tensor, ""]) -> None:
        """Called after the optimizer has moved the parameters.

        ``took`` is false, on every process, where the step was skipped: then nothing may move.
        """

    def concerns(self, means: dict[str, float]) -> dict[str, str]:
        """Problems of the training, by the means of its scalars over some steps.

        A short name, and a line for people with the usual remedies; empty if there are none.
        """
        return {}

    def trains(self, name: str, parameter: nn.Parameter) -> bool:
        """True if the optimizer moves the parameter of this name."""
        return parameter.requires_grad

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """True where weight decay applies: to all but biases and other vectors."""
        return parameter.ndim > 1 and not name.endswith(".bias")

    def network_of(self, name: str) -> str:
        """Name of the network of a parameter, where gradients are clipped by network."""
        return ""

    def lr_scale(self, name: str) -> float:
        """Factor of the learning rate, for the parameter of this name."""
        return 1.0

    def place_of(self, name: str) -> Place:
        """Place of the parameter of this name, for the options that scale rates by it."""
        return Place()


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the precision that they have, also within autocast, which would round them."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precisions as float32, for losses and softmaxes; float64 stays, for parity tests."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
