"""Dense fine-tuning: an encoder and a head on its feature maps, trained together, as a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ssl_vit.common.errors import UserError
from ssl_vit.common.task import Views
from ssl_vit.data.dense import TARGET
from ssl_vit.evaluators.maps import FeatureMaps, freeze_unused, with_drop_path
from ssl_vit.evaluators.maps_task import MapsTask
from ssl_vit.model.encoder import Encoder

Loss = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
"""Loss: from what the head makes of a batch and its targets to scalars, among them ``loss``."""


class DenseNetwork(nn.Module):
    """Network for places in an image: feature maps, and a head on them.

    ``heads_maps``: from the list of maps to what the head takes.
    """

    def __init__(
        self, maps: FeatureMaps, head: nn.Module, heads_maps: Callable[[list[Tensor]], Any]
    ) -> None:
        super().__init__()
        self.maps, self.head, self.heads_maps = maps, head, heads_maps

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.head(self.heads_maps(self.maps(images)))
        return made


class DenseTune(MapsTask):
    """Dense fine-tuning task: the loss of a network's predictions for augmented crops."""

    def __init__(self, network: DenseNetwork, loss: Loss, layer_decay: float) -> None:
        super().__init__()
        self.network, self.loss = network, loss
        self.train_encoder(network.maps, "network.maps", layer_decay)

    @property
    def evaluated(self) -> DenseNetwork:
        """Network that is evaluated and saved."""
        return self.network

    def forward(self, views: Views, step: int) -> dict[str, Tensor]:
        """Scalars of ``Loss``."""
        return dict(self.loss(self.network(views.crops[0]), views.drawn[TARGET]))


def trainable(module: nn.Module, drop_path: float) -> nn.Module:
    """Encoder with stochastic depth, with the same weights; another network as it is."""
    if not isinstance(module, Encoder) or not drop_path:
        return module
    return with_drop_path(module, drop_path)


def train_what_counts(network: DenseNetwork, size: tuple[int, int], channels: int) -> None:
    """Train the weights of the encoder that its maps depend on, and no others.

    Raises:
        UserError: the network takes no images of this size.
    """
    try:
        freeze_unused(network.maps, channels, size)
    except Exception as error:  # timm's networks raise what they like
        text, sides = " ".join(str(error).split())[:200], f"{size[0]}x{size[1]}"
        remedy = "give another --tune.image-size"
        raise UserError(f"images of {sides} do not fit: {text}; {remedy}") from None
