"""Options of pretraining, before a method has built anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ssl_vit.common.config import EncoderConfig, InitConfig, RunConfig
from ssl_vit.common.rates import PretrainOptim
from ssl_vit.common.reading import DataConfig
from ssl_vit.methods import MethodOptions

M = TypeVar("M")


@dataclass(frozen=True)
class PretrainConfig(Generic[M]):
    """Options of a pretraining run."""

    method: M
    config: str = ""
    """A YAML file of options, or a recipe by its name in configs/. The command line wins. Without
    this and --data.train: the method's recipe for the digits inside scikit-learn."""
    dry_run: bool = False
    """Build everything, take some steps, and print what the run needs (memory, time) and what looks
    wrong. Nothing is written."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    init: InitConfig = field(default_factory=InitConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    optim: PretrainOptim = field(default_factory=PretrainOptim)


def default_options(options: Any, method: MethodOptions, **groups: dict[str, Any]) -> Any:
    """Default options (``options`` is a ``PretrainConfig``) of a method, before YAML and flags.

    ``groups``: a command's own defaults of shared options; those of the method take precedence.
    """
    kinds = {"run": RunConfig, "data": DataConfig, "encoder": EncoderConfig, "optim": PretrainOptim}
    given = groups | method.defaults
    shared = {name: kind(**given.get(name, {})) for name, kind in kinds.items()}
    return options(method=method.config(), **shared)
