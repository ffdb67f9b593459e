"""Training on feature maps: rates and decay of an encoder's weights below a pyramid or a head."""

from __future__ import annotations

from typing import Any

from torch import nn

from ssl_vit.common.task import Place, Task
from ssl_vit.evaluators.classifier import layer_scales, undecayed
from ssl_vit.evaluators.maps import FeatureMaps
from ssl_vit.model.encoder import Encoder


class MapsTask(Task):
    """Task that trains an encoder by its feature maps, and what is new above them.

    What is new is the layer after the encoder's last, as a classifier is in ``layer_scales``: the
    last block has the layer decay, the one below it its square; the final norm of a plain ViT has
    the whole rate.

    Subclasses call :meth:`train_encoder` once their modules are there.
    """

    _scales: dict[str, float]
    _undecayed: frozenset[str]
    _start: str

    def train_encoder(self, maps: FeatureMaps, start: str, layer_decay: float) -> None:
        """Take in the encoder of ``maps``, which is the submodule of the task named ``start``."""
        network: Any = maps.network
        plain = isinstance(network, Encoder)
        inner, prefix = (network.vit, "network.vit.") if plain else (network, "network.")
        self._start = f"{start}."
        trained = any(p.requires_grad for p in network.parameters())
        scales = layer_scales(inner, layer_decay) if trained else {}
        norms = ("norm.", "fc_norm.") if plain else ()
        self._scales = {
            f"{start}.{prefix}{name}": scale if name.startswith(norms) else scale * layer_decay
            for name, scale in scales.items()
        }
        self._undecayed = frozenset(f"{start}.{prefix}{name}" for name in undecayed(inner))

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Weight decay of all but vectors, positions, tokens, and timm's own exceptions."""
        return super().decays(name, parameter) and name not in self._undecayed

    def lr_scale(self, name: str) -> float:
        """Layer-wise learning-rate decay of the encoder; 1 of all that is new."""
        return self._scales.get(name, 1.0)

    def place_of(self, name: str) -> Place:
        """Place of a parameter: in the encoder, or not."""
        return Place(encoder=name.startswith(self._start))
