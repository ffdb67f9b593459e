"""Method: a Task around an encoder, made of objectives, that states which views it needs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ssl_vit.common.config import EncoderConfig
from ssl_vit.common.errors import UserError, check
from ssl_vit.common.scalars import Scalar
from ssl_vit.common.task import Place, Task, Views
from ssl_vit.data.augment import ViewSpec
from ssl_vit.data.loader import draw_all
from ssl_vit.data.normalize import Normalize
from ssl_vit.data.order import Places
from ssl_vit.methods import check_name
from ssl_vit.model.architecture import take_memory, without_memory
from ssl_vit.model.encoder import Encoder
from ssl_vit.objectives.base import Objective, Reconstruction, Setting
from ssl_vit.objectives.lora import Adapters
from ssl_vit.objectives.nearness import Nearness
from ssl_vit.options.base import Defaults, MethodConfig, Target
from ssl_vit.weights.exchange import load_strictly, resample_positions

# Parameters of an encoder, beside the patch embedding, that come before its first block.
_FIRST = ("cls_token", "pos_embed", "reg_token")


class Method(Task):
    """A self-supervised method. One file in ``methods/`` defines one subclass.

    Attributes:
        Config: its options, a :class:`MethodConfig`.
        title: its name for people.
        explained: what each of its scalars means, by name; ``loss`` among them.
        pooling: the feature it is watched by: ``mean`` of the patches, or ``cls``.
        defaults: its values for the shared groups, as ``{"optim": {"betas": (0.9, 0.95)}}``.
        reconstructs: whether :meth:`reconstruct` is there.
        splits_with: options with which ``--optim.accumulate`` parts give the whole batch's step, of
            a method in which images of a part see each other; empty: any do.
        encoders: its options that name other encoders' files: part of what a run is.
        objectives: what it minimises, by name, each with its own networks.
        weights: of the objectives' losses in the sum.
    """

    Config: ClassVar[type]
    title: ClassVar[str]
    explained: ClassVar[dict[str, Scalar]]
    pooling: ClassVar[str] = "mean"
    defaults: ClassVar[Defaults] = {}
    reconstructs: ClassVar[bool] = False
    splits_with: ClassVar[dict[str, Any]] = {}
    encoders: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, encoder_config: EncoderConfig, channels: int) -> None:
        super().__init__()
        check(
            encoder_config.norm == "tokens",
            "--encoder.norm is 'pooled' (as in fine-tuned files); pretraining needs tokens",
        )
        self.config = config
        self.encoder = Encoder(encoder_config, channels)
        self.nearness: Nearness | None = None
        self.adapters: Adapters | None = None
        self.objectives = nn.ModuleDict()
        self.weights: dict[str, float] = {}

    def add(self, name: str, objective: Objective, weight: float = 1.0) -> None:
        """Minimise this, too; its weight is above 0, as all that is trained needs a gradient."""
        assert weight > 0, f"{name} has weight {weight}"
        self.objectives[name] = objective
        self.weights[name] = weight

    def parts(self) -> Sequence[tuple[str, Objective]]:
        """The objectives with their names."""
        return [(n, o) for n, o in self.objectives.items() if isinstance(o, Objective)]

    @property
    def objective(self) -> Any:
        """The objective, of a method that has one."""
        ((_, objective),) = self.parts()
        return objective

    # What a method must define.

    @staticmethod
    def views(config: Any, encoder: Encoder) -> ViewSpec:
        """Crops that the method sees of an image, for this encoder, and in earlier phases."""
        raise NotImplementedError

    @staticmethod
    def draw(config: Any, grid: tuple[int, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays drawn for one sample, in the workers: masks, index sets, by name.

        Shapes are the same for all samples. Called with a generator that is a function of (seed,
        epoch, image), so the same at any number of workers and processes. Arrives stacked, as
        ``views.drawn``; where ``views`` come from an evaluation, :meth:`drawn` gives it.

        Args:
            grid: rows and columns of the encoder's patches.
        """
        return {}

    @staticmethod
    def draw_together(config: Any, grid: tuple[int, int], places: Places) -> dict[str, np.ndarray]:
        """Arrays drawn for images of a step together, in the workers, by name.

        For what an image's own generator cannot give: so many masked images in a batch, strata.
        Called for each part of a step, on each process, with the places of its images in the whole
        batch: a function of these alone, so that the parts together are the same at any number of
        workers, processes and parts. Shapes are functions of (batch, count). Arrives in
        ``views.drawn``, beside what :meth:`draw` gives, as it is.
        """
        return {}

    # What it may define.

    def seen_by(self, name: str, views: Views) -> Views:
        """The part of a batch that an objective sees: all of it, where there is one."""
        return views

    def begin_with(self, state: dict[str, Tensor], where: str) -> None:
        """Take these weights (of ``encoder.vit``) for the first ones.

        Raises:
            UserError: they do not match; ``where`` says whose they are.
        """
        load_strictly(self.encoder.vit, state, where)
        for _, objective in self.parts():
            objective.encoder_replaced(self.encoder)

    def set_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Called before the first step: by what views are normalised."""
        for _, objective in self.parts():
            objective.set_statistics(mean, std)

    def stay_near(self, weight: float) -> None:
        """Keep the encoder's features near those that it has now, by a term of this weight."""
        self.nearness = Nearness(self.encoder, weight)

    def adapt(self, rank: int) -> None:
        """Train low-rank adapters of the encoder in place of itself."""
        self.adapters = Adapters(self.encoder, rank)

    def trains(self, name: str, parameter: nn.Parameter) -> bool:
        """True if a parameter is trained; of an encoder with adapters, these alone."""
        if self.adapters is None or not name.startswith(("encoder.", "adapters.")):
            return parameter.requires_grad
        return name.startswith("adapters.")

    def exported_encoder(self) -> Encoder:
        """The encoder that is saved and evaluated."""
        return self.encoder

    def advice(self, setting: Setting) -> list[str]:
        """Problems of the objectives' options in this setting: lines with the remedy."""
        return [line for _, objective in self.parts() for line in objective.advice(setting)]

    def panels(self, views: Views, normalize: Normalize) -> dict[str, np.ndarray]:
        """Pictures (H, W, 3) uint8 that show what the method does with these views: by default
        reconstructions, where it ``reconstructs``."""
        if not self.reconstructs:
            return {}
        first, missing = views.crops[0], views.missing_of(0)
        return self.reconstruct(first, views.keys, normalize, missing=missing).panel()

    def reconstruct(
        self,
        images: Float[Tensor, "b c h w"],
        keys: Int64[Tensor, " b"],
        normalize: Normalize,
        mask_ratio: float = 0.0,
        target: Target = "auto",
        missing: Bool[Tensor, "b c h w"] | None = None,
    ) -> Reconstruction:
        """Masked images and what is predicted of them, where ``reconstructs``; arguments and errors
        are those of :meth:`Objective.reconstruct`."""
        able = [o for _, o in self.parts() if type(o).reconstruct is not Objective.reconstruct]
        assert able, f"no objective of {type(self).__name__} reconstructs"
        how = mask_ratio, target, missing
        return able[0].reconstruct(self.encoder, images, keys, normalize, *how)

    @classmethod
    def from_file(cls, file: Path, encoder: Encoder) -> Method | None:
        """A whole method of which another library's file holds more than the encoder; None: this
        file does not."""
        return None

    # What follows from it.

    def forward(self, views: Views, step: int) -> dict[str, Tensor]:
        """The objective's scalars; of several objectives each one's as ``name_scalar``, and
        ``loss``, the sum by their weights; with the distance from the first features, where it is
        a term of the loss."""
        scalars = self._scalars(views, step)
        if self.nearness is None:
            return scalars
        distance = self.nearness.distance(self.encoder, views.crops[0])
        loss = scalars["loss"] + self.nearness.weight * distance
        return scalars | {"loss": loss, "start_distance": distance.detach()}

    def _scalars(self, views: Views, step: int) -> dict[str, Tensor]:
        """Scalars of the objectives."""
        parts = self.parts()
        found = {n: o(self.encoder, self.seen_by(n, views), step) for n, o in parts}
        if len(found) == 1:
            return next(iter(found.values()))
        losses = [self.weights[name] * scalars["loss"] for name, scalars in found.items()]
        apart = {f"{n}_{k}": value for n, scalars in found.items() for k, value in scalars.items()}
        return {"loss": torch.stack(losses).sum(), **apart}

    def place_of(self, name: str) -> Place:
        """Place of a parameter: in the encoder that is trained, or beside it."""
        own, depth = name.removeprefix("encoder.vit."), len(self.encoder.vit.blocks)
        if name.startswith("adapters."):
            return Place(True, depth - Adapters.block_of(name))
        if own == name:
            return Place()
        patches = own.startswith("patch_embed.")
        if patches or own in _FIRST:
            return Place(True, depth + 1, patches)
        block = own.startswith("blocks.")
        return Place(True, depth - int(own.split(".")[1]) if block else 0)

    def set_length(self, steps: int, steps_per_epoch: int) -> None:
        """Pass it on to the objectives."""
        for _, objective in self.parts():
            objective.set_length(steps, steps_per_epoch)

    def before_update(self, step: int) -> None:
        """Pass it on to the objectives, and to adapters."""
        for _, objective in self.parts():
            objective.before_update(step)
        if self.adapters is not None:
            self.adapters.before_update(self.encoder)

    def after_update(self, step: int, took: Bool[Tensor, ""]) -> None:
        """Let matrices follow their adapters; then pass it on to the objectives."""
        if self.adapters is not None:
            self.adapters.after_update(self.encoder)
        for _, objective in self.parts():
            objective.after_update(self.encoder, step, took)

    def concerns(self, means: dict[str, float]) -> dict[str, str]:
        """Concerns of the objectives."""
        found: dict[str, str] = {}
        for name, objective in self.parts():
            start = f"{name}_" if len(self.objectives) > 1 else ""
            own = {k.removeprefix(start): v for k, v in means.items() if k.startswith(start)}
            found |= objective.concerns(own)
        return found

    def drawn(self, keys: Int64[Tensor, " b"], places: Places | None = None) -> dict[str, Tensor]:
        """Draws of :meth:`draw` and :meth:`draw_together` for samples of these keys, on their
        device, as a loader does; without ``places`` they are a step of their own."""
        spec = self._with_draws(self.config, self.encoder.grid, ViewSpec(()))
        found = draw_all(spec, keys.tolist(), places)
        return {name: value.to(keys.device) for name, value in found.items()}

    @classmethod
    def view_spec(cls, config: Any, encoder: Encoder) -> ViewSpec:
        """:meth:`views`, with :meth:`draw` and :meth:`draw_together` where the method has them."""
        spec, patch = cls.views(config, encoder), encoder.patch_size
        grids = [(phase.size[0] // patch, phase.size[1] // patch) for phase in spec.phases]
        phases = tuple(
            replace(phase, spec=cls._with_draws(config, grid, phase.spec))
            for phase, grid in zip(spec.phases, grids, strict=True)
        )
        return replace(cls._with_draws(config, encoder.grid, spec), phases=phases)

    @classmethod
    def _with_draws(cls, config: Any, grid: tuple[int, int], spec: ViewSpec) -> ViewSpec:
        if cls.draw is not Method.draw:
            spec = replace(spec, draw=partial(cls.draw, config, grid))
        if cls.draw_together is not Method.draw_together:
            spec = replace(spec, draw_together=partial(cls.draw_together, config, grid))
        return spec

    @classmethod
    def blank(cls, config: Any, encoder: EncoderConfig, channels: int) -> Method:
        """The method on the CPU, whose weights are still to be loaded: drawing them takes time."""
        with without_memory():
            made = cls(config, encoder, channels)
        take_memory(made)
        for _, objective in made.parts():
            objective.fill_buffers(made.encoder)
        return made

    def for_size(self, size: tuple[int, int]) -> Method:
        """The same method, weights included, for images of ``size``; positions are resampled."""
        old = self.encoder
        if size == old.image_size:
            return self
        made = self.blank(self.config, replace(old.config, image_size=size), old.channels)
        state = self.state_dict()
        for name, part in self.named_modules():
            if isinstance(part, Encoder):  # a teacher has one, too
                new = made.get_submodule(name)
                assert isinstance(new, Encoder)
                resampled = resample_positions(part.vit.state_dict(), part, new)
                state |= {f"{name}.vit.{key}": value for key, value in resampled.items()}
        made.load_state_dict(state, strict=True)
        for (_, objective), (_, own) in zip(made.parts(), self.parts(), strict=True):
            objective.take_tables(own, old)
        return made


def find_method(name: str) -> type[Method]:
    """The method defined in ``methods/<name>.py``: its own one Method; imported ones do not count.

    Raises:
        UserError: no such file (the nearest name is given), or a file without one method.
    """
    check_name(name)
    try:
        module = importlib.import_module(f"ssl_vit.methods.{name}")
    except Exception as error:
        raise UserError(f"methods/{name}.py cannot be imported: {error!r}") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    ]
    check(
        len(found) == 1,
        f"methods/{name}.py must define one subclass of Method; it defines {len(found)} "
        f"({', '.join(kind.__name__ for kind in found) or 'none'})",
    )
    kind = found[0]
    config = getattr(kind, "Config", None)
    options = isinstance(config, type) and issubclass(config, MethodConfig) and is_dataclass(config)
    named = bool(getattr(kind, "title", "")) and "loss" in getattr(kind, "explained", {})
    check(
        options and named,
        f"methods/{name}.py: {kind.__name__} must define its Config (a frozen dataclass on "
        "MethodConfig), its title, and in explained what its scalars mean, loss among them",
    )
    return kind
