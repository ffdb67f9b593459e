"""What a self-supervised method is: a Task around an Encoder that knows which views it needs."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ssl_vit import methods
from ssl_vit.common.config import EncoderConfig, UserError, check, did_you_mean
from ssl_vit.common.task import Task, Views
from ssl_vit.data.augment import Normalize, ViewSpec
from ssl_vit.model.encoder import Encoder
from ssl_vit.weights.exchange import load_strictly


@dataclass(frozen=True)
class Setting:
    """What a method is asked to train in, as a preflight has found it.

    ``images``: of the training set. ``batch_size``: of a step, over all processes and ``parts``.
    ``lacking``: bytes of memory that a process would need beside what there is; 0: it fits.
    ``per_crop``: bytes that one crop of the most numerous kind takes, for all images that go
    through at once; 0: unknown.
    """

    images: int
    batch_size: int
    parts: int
    lacking: float = 0.0
    per_crop: float = 0.0


class Method(Task):
    """A self-supervised objective. One file in ``methods/`` defines one subclass.

    ``Config`` is its frozen dataclass of options, with the paper's values as defaults; ``defaults``
    are its values for the shared groups, as ``{"optim": {"betas": (0.9, 0.95)}}``; ``pooling`` is
    the feature it is watched by: ``mean`` of the patches, or ``cls``.
    """

    Config: ClassVar[type]
    pooling: ClassVar[str] = "mean"
    defaults: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, config: Any, encoder_config: EncoderConfig, channels: int) -> None:
        super().__init__()
        check(
            encoder_config.norm == "tokens",
            "--encoder.norm is 'pooled' (as in fine-tuned files); pretraining needs tokens",
        )
        self.config = config
        self.encoder = Encoder(encoder_config, channels)

    @staticmethod
    def views(config: Any, encoder: Encoder) -> ViewSpec:
        """Which crops the method sees of an image, for this encoder."""
        raise NotImplementedError

    def begin_with(self, state: dict[str, Tensor], where: str) -> None:
        """Take these weights (of ``encoder.vit``) for the first ones.

        Raises:
            UserError: they do not match; ``where`` says whose they are.
        """
        load_strictly(self.encoder.vit, state, where)

    def exported_encoder(self) -> Encoder:
        """The encoder that is saved and evaluated."""
        return self.encoder

    def advice(self, setting: Setting) -> list[str]:
        """What looks wrong with the method's options in this setting: lines with the remedy."""
        return []

    def panels(self, views: Views, normalize: Normalize) -> dict[str, np.ndarray]:
        """Pictures (H, W, 3) uint8 that show what the method does with these views."""
        return {}


def method_names() -> list[str]:
    """The methods there are: the modules of ``methods/`` but this one."""
    return sorted(m.name for m in pkgutil.iter_modules(methods.__path__) if m.name != "base")


def find_method(name: str) -> type[Method]:
    """The method defined in ``methods/<name>.py``.

    Raises:
        UserError: no such file; the nearest name is given.
    """
    names = method_names()
    if name not in names:
        raise UserError(
            f"method is {name!r}; it must be one of {', '.join(names)}{did_you_mean(name, names)}"
        )
    module = importlib.import_module(f"ssl_vit.methods.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value is not Method
    ]
    assert len(found) == 1, f"methods/{name}.py must define one Method, found {found}"
    return found[0]
